"""Run by a Python that has NeMo: folder, inputs, output; logits of what NeMo restores, on the CPU.

Words: FOLDER INPUTS OUTPUT [exact]; `exact` leaves inputs of linears unrounded. Inputs and output
are safetensors files as `logits` takes and writes them.
"""

import contextlib
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from safetensors.torch import load_file, save_file

from nemo.collections.llm.gpt.model.base import local_layer_spec
from nemo.lightning.io import load_context

LANGUAGE = "module.language_model."


def start():
    """One rank on the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    CudaRNGStatesTracker.fork = lambda *names: contextlib.nullcontext()  # nothing is dropped


def restore(folder):
    """NeMo's model with everything of the folder in it."""
    model = load_context(folder / "context", subpath="model")
    text = model.config.language_transformer_config
    for config in (model.config, text, model.config.vision_projection_config):
        config.use_cpu_initialization, config.perform_initialization = True, False
        config.bias_activation_fusion = config.bias_dropout_fusion = False
        config.masked_softmax_fusion = config.persist_layer_norm = False
        config.apply_rope_fusion = config.gradient_accumulation_fusion = False
    text.transformer_layer_spec = local_layer_spec
    model.configure_model()
    weights = folder / "weights"
    module = model.module
    if (weights / "modelopt_state").is_dir():
        from modelopt.torch.opt.plugins import restore_sharded_modelopt_state

        restore_sharded_modelopt_state([module.language_model], str(weights), prefix=LANGUAGE)
    state = module.sharded_state_dict(prefix="module.")
    loaded = dist_checkpointing.load(state, str(weights), strict="raise_all")
    own = {name.removeprefix("module."): value for name, value in loaded.items()}
    missing, unexpected = module.load_state_dict(own, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "_extra_state" not in name], missing
    return model


def prepare(module, exact):
    """Float32, and inputs of linears rounded or not."""
    module.float().eval()
    for name, one in module.named_modules():  # DEBUG
        if type(one).__name__ == "TensorQuantizer" and one.is_enabled: print("DBG", name, one._if_calib, one)
    for name, one in module.named_parameters():
        if not one.isfinite().all(): print("NAN", name)
    for name, one in module.named_modules():
        if type(one).__name__ == "TensorQuantizer" and exact and "weight_quantizer" not in name:
            one.disable()
        if type(one).__name__ == "TensorQuantizer" and getattr(one, "is_nvfp4_dynamic", False):
            one.backend = "nvfp4_on_cpu"


@torch.no_grad()
def logits(module, inputs):
    """[B,S,V] float32."""
    ids = inputs["input_ids"]
    image, count = int(inputs["image_id"]), int(inputs["image_tokens"])
    rows = []
    for row, ids_S in enumerate(ids.tolist()):
        short, place = [], 0
        while place < len(ids_S):
            short.append(-200 if ids_S[place] == image else ids_S[place])
            place += count if ids_S[place] == image else 1
        tokens = torch.tensor([short])
        size = len(ids_S)
        mask = torch.ones(1, 1, size, size).triu(1).bool()
        out = module(
            input_ids=tokens,
            position_ids=torch.arange(len(short))[None],
            attention_mask=mask,
            images=inputs["pixel_values"][row : row + 1],
            num_image_tiles=[1],
        )
        rows.append(out[0])
    return torch.stack(rows)


def main():
    folder, source, target, *words = sys.argv[1:]
    start()
    model = restore(Path(folder))
    if Path(folder, "weights", "modelopt_state").is_dir():
        register_nvfp4()
    prepare(model.module, "exact" in words)
    save_file({"logits": logits(model.module, load_file(source)).contiguous()}, target)


def register_nvfp4():
    """modelopt rounds to nvfp4 with a CUDA kernel alone: here is what it does, in torch."""
    from modelopt.torch.quantization.nn import register_quant_backend

    def fp8(x):
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()

    def round_nvfp4(x, quantizer):
        scale = quantizer._get_amax(x).amax().float() / (6 * 448)
        blocks = x.float().unflatten(-1, (-1, 16))
        step = fp8(blocks.abs().amax(-1, keepdim=True) / (6 * scale)) * scale
        size = (blocks / step).abs()
        grid = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        code = ((size / grid).round() * grid).clamp(max=6) * blocks.sign()
        return torch.where(step > 0, code * step, torch.zeros_like(code)).flatten(-2).to(x.dtype)

    register_quant_backend("nvfp4_on_cpu", round_nvfp4)


if __name__ == "__main__":
    main()

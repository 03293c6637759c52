"""Compute logits of models that NeMo restores, on the CPU; runs in an environment of NeMo 2.7.3.

    python nemo_restore.py INPUTS OUTPUTS FOLDER...

INPUTS is a safetensors file as for `nemo-vlm-ptq logits`, with `image_id` and `image_tokens`. For a
folder NAME/nemo, OUTPUTS/NAME.safetensors gets logits [B,S,V]: `rounded`, and `exact` with 16 bit
inputs of linears.
"""

import contextlib
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from modelopt.torch.opt.plugins import restore_sharded_modelopt_state
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from nemo.collections.llm.gpt.model.base import local_layer_spec
from nemo.lightning.io import load_context
from safetensors.torch import load_file, save_file

NEMO_IMAGE_ID = -200  # one placeholder per image
DISABLED_OPTIONS = (
    "apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion",
    "gradient_accumulation_fusion", "masked_softmax_fusion", "perform_initialization",
    "persist_layer_norm",
)  # fmt: skip


def initialize():
    """Initialize Megatron for one rank without a GPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    CudaRNGStatesTracker.fork = lambda *names: contextlib.nullcontext()  # there is no dropout
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    register_quant_backend("nvfp4_on_cpu", round_nvfp4)


def restore(folder):
    """Build the model from context/ and load weights/, with no key missing or unexpected."""
    model = load_context(folder / "context", subpath="model")
    text = model.config.language_transformer_config
    text.transformer_layer_spec = local_layer_spec
    for config in (model.config, text, model.config.vision_projection_config):
        config.use_cpu_initialization = True
        for name in DISABLED_OPTIONS:
            setattr(config, name, False)
    model.configure_model()
    module, weights = model.module, str(folder / "weights")
    for parameter in module.parameters():
        parameter.data.zero_()
    prefix = "module.language_model."
    restore_sharded_modelopt_state([module.language_model], weights, prefix=prefix)
    state = module.sharded_state_dict(prefix="module.")
    loaded = dist_checkpointing.load(state, weights, strict="raise_all")
    own = {name.removeprefix("module."): value for name, value in loaded.items()}
    missing, unexpected = module.load_state_dict(own, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "_extra_state" not in name], missing
    return module.float().eval()


def fp8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def round_nvfp4(x, quantizer):
    """Fake-quantize to nvfp4 in torch; modelopt has a CUDA kernel only."""
    scale = quantizer._get_amax(x).amax().float() / (6 * 448)
    blocks = x.float().unflatten(-1, (-1, 16))
    step = fp8(blocks.abs().amax(-1, keepdim=True) / (6 * scale)) * scale
    magnitude = (blocks / step).abs()
    spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    code = ((magnitude / spacing).round() * spacing).clamp(max=6) * blocks.sign()
    return torch.where(step > 0, code * step, torch.zeros_like(code)).flatten(-2).to(x.dtype)


def use_torch_for_nvfp4(module):
    for one in module.modules():
        if isinstance(one, TensorQuantizer) and one.is_nvfp4_dynamic:
            one.backend = "nvfp4_on_cpu"


def disable_input_quantizers(module):
    for name, one in module.named_modules():
        if isinstance(one, TensorQuantizer) and "weight_quantizer" not in name:
            one.disable()


@torch.no_grad()
def logits(module, inputs):
    """Return logits [B,S,V] float32; image ids are replaced by NeMo's placeholder."""
    image, count = int(inputs["image_id"]), int(inputs["image_tokens"])
    rows = []
    for ids, pixels in zip(inputs["input_ids"].tolist(), inputs["pixel_values"], strict=True):
        first = ids.index(image)
        input_ids = torch.tensor([[*ids[:first], NEMO_IMAGE_ID, *ids[first + count :]]])
        out = module(
            input_ids=input_ids,
            position_ids=torch.arange(input_ids.shape[1])[None],
            attention_mask=torch.ones(1, 1, len(ids), len(ids)).triu(1).bool(),
            images=pixels[None],
            num_image_tiles=[1],
        )
        rows.append(out[0])
    return torch.stack(rows)


def main():
    source, target, *folders = map(Path, sys.argv[1:])
    initialize()
    inputs = load_file(source)
    for folder in folders:
        module = restore(folder)
        use_torch_for_nvfp4(module)
        found = {"rounded": logits(module, inputs)}
        disable_input_quantizers(module)
        found["exact"] = logits(module, inputs)
        save_file({name: one.contiguous() for name, one in found.items()},
                  target / f"{folder.parent.name}.safetensors")  # fmt: skip


if __name__ == "__main__":
    main()

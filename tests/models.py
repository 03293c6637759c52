"""Tiny random LLaVA models, samples for them, and launching of ranks.

Shared by test modules and the rank scripts that they launch with torchrun.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
TINY_LLAVA = ROOT / "assets" / "tiny-llava"
WEIGHTS = "model.safetensors"
STAGES = ("import", "observe", "solve", "export")
IMAGE_ID, IMAGE_TOKENS, VOCAB = 499, 16, 500
LAUNCH_TIMEOUT_S = 600.0
PORTS_VARIABLE = "TEST_PORTS"  # environment variable: a free port per parallel context of a launch
MAX_PARALLEL_CONTEXTS = 50  # of one launch

# 4 KV heads and 512 MLP features allow TP 4; groups of 128 allow TP 2; 500 is no multiple of 64.
TEXT = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 64,
}


@dataclass(frozen=True)
class TokenizedQuestion:
    """Input ids [S] int64, with one id per image token, and pixel values [1,3,32,32] or None."""

    ids: torch.Tensor
    pixels: torch.Tensor | None


@dataclass(frozen=True)
class TinyModel:
    """A random model on disk, in float32 and bfloat16, and the logits of transformers."""

    float32: Path
    bfloat16: Path
    cases: Path  # torch file: case -> list of TokenizedQuestion fields
    expected: dict[str, list[torch.Tensor]]  # case -> logits [S,V] of each sample, float32


def build_llava():
    """Build transformers' model with random weights; norms scale up some outlier channels."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.06)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name.endswith("layernorm.weight") and "language_model" in name:
            parameter[torch.randperm(len(parameter))[:6]] *= 8
    return model


def published_name(name: str) -> str:
    """Return the llava-hf checkpoints' name of a parameter of transformers' model."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = name.removeprefix("model.")
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def transformers4_name(name: str) -> str:
    """Return the parameter name of a published tensor in transformers 4.5x."""
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


def transformers5_name(name: str) -> str:
    """Return the name of a published tensor in transformers 5."""
    return transformers4_name(name).replace("vision_tower.vision_model.", "vision_tower.")


def write_llava(model, folder: Path, dtype: torch.dtype, rename=lambda name: name) -> Path:
    """Write a model folder with published tensor names, mapped by `rename`."""
    folder.mkdir()
    tensors = {
        rename(published_name(name)): tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def random_questions(lengths, images, seed: int) -> list[TokenizedQuestion]:
    """Return a random question of each length; those with an index in `images` have an image."""
    generator = torch.Generator().manual_seed(seed)
    questions = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, IMAGE_ID, (length,), generator=generator)
        pixels = None
        if index in images:
            start = 2 + index
            ids[start : start + IMAGE_TOKENS] = IMAGE_ID
            pixels = torch.randn(1, 3, 32, 32, generator=generator)
        questions.append(TokenizedQuestion(ids, pixels))
    return questions


def identity_preprocess(micro_batch, with_images):
    """Return samples that are preprocessed already, as ObserveSetup.preprocess."""
    return list(micro_batch)


def to_samples(questions):
    """Convert questions to Sample records."""
    from nemo_vlm_ptq.families.base import ImageInputs, Sample

    return [
        Sample(
            id=f"q{index}",
            input_ids=question.ids,
            is_image=question.ids == IMAGE_ID,
            images=None if question.pixels is None else ImageInputs(question.pixels),
        )
        for index, question in enumerate(questions)
    ]


@torch.no_grad()
def transformers_logits(model, question: TokenizedQuestion) -> torch.Tensor:
    """Return logits [S,V] of one question, without padding."""
    return model(input_ids=question.ids[None], pixel_values=question.pixels).logits[0]


def free_ports(count: int) -> list[int]:
    """Return unused ports outside of the range that the system assigns to connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("localhost", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def main_command(module: str) -> list[str]:
    """Return torchrun arguments that run main() of a module in tests/.

    The module does not run as __main__: the processes that write checkpoints would import it again.
    """
    code = f"import gc; gc.disable(); from {module} import main; gc.enable(); main()"
    return ["--no-python", sys.executable, "-c", code]


def launch_ranks(arguments, ranks: int, timeout: float = LAUNCH_TIMEOUT_S) -> tuple[int, str, str]:
    """Run torchrun on a script, `-m module` or `main_command`.

    Returns:
        Exit code, stdout, stderr.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(ranks), *map(str, arguments)]
    settings = {
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        PORTS_VARIABLE: " ".join(map(str, free_ports(MAX_PARALLEL_CONTEXTS))),
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then terminates its ranks
            out, err = process.communicate(timeout=30)
            err += f"\nterminated after {timeout} s"
    return process.returncode, out, err


def parallel_contexts(layouts):
    """Yield a ParallelContext per layout (tensor, pipeline, data), one after the other.

    Each context uses its own store: torchrun's store still holds the keys of the previous one.
    """
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for sizes, port in zip(layouts, os.environ[PORTS_VARIABLE].split(), strict=False):
        os.environ["MASTER_PORT"] = port
        with parallel_context(
            dict(zip(("tensor", "pipeline", "data"), sizes, strict=True))
        ) as parallel:
            yield parallel


def single_rank():
    """Return a context manager for the ParallelContext of a single rank, this process."""
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context

    return parallel_context({"tensor": 1, "pipeline": 1, "data": 1})


def load_with_megatron(model, folder: Path) -> None:
    """Load weights and quantizer states with megatron-core's loader, as other tools do."""
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


def run_all_stages(parallel, workdir: Path) -> None:
    """Run all stages on the trained tiny model, in all formats, in the layout of a context."""
    from nemo_vlm_ptq.context import RunContext
    from nemo_vlm_ptq.formats import FORMATS
    from nemo_vlm_ptq.planning.make_plan import make_plan
    from nemo_vlm_ptq.recipe import Recipe
    from nemo_vlm_ptq.stages import run_stages
    from nemo_vlm_ptq.targets.registry import TARGETS

    recipe = Recipe(
        model=str(TINY_LLAVA),
        workdir=str(workdir),
        parallel=vars(parallel.layout),
        quantize={"format": tuple(FORMATS)},
        calibration={"data": "scenes", "samples": 12, "micro_batch": 2, "keep_statistics": True},
        export={"targets": tuple(TARGETS), "tensor": 2},
    )
    run_stages(RunContext(plan=make_plan(recipe), parallel=parallel), STAGES)

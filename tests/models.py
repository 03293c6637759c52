"""Tiny random LLaVAs, samples for them, and ranks: what pytest and the scripts of ranks share."""

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
PATIENCE = 600  # seconds that ranks may take
PORTS = "TEST_PORTS"  # environment variable: a free port for each session of a launch

# 4 KV heads and 512 MLP features let TP be 4; groups of 128 fit at TP 2; 500 is not 64 * n
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
class Question:
    """ids [S] int64 with one id for each image token; pixels [1,3,32,32], or None."""

    ids: torch.Tensor
    pixels: torch.Tensor | None


@dataclass(frozen=True)
class Tiny:
    """A random model on disk, in float32 and in bfloat16, and what transformers says with it."""

    float32: Path
    bfloat16: Path
    cases: Path  # torch file: case -> [(ids, pixels)]
    expected: dict[str, list[torch.Tensor]]  # case -> logits [S,V] of each sample, float32


def build_llava():
    """transformers' model with random weights, whose norms let some channels stand out."""
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


def published(name: str) -> str:
    """The llava-hf checkpoints' name of a parameter of transformers' model."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = name.removeprefix("model.")
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def in_memory(name: str) -> str:
    """What transformers 4.5x calls a published tensor in memory."""
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


def in_five(name: str) -> str:
    """What transformers 5 calls a published tensor."""
    return in_memory(name).replace("vision_tower.vision_model.", "vision_tower.")


def write_llava(model, folder: Path, dtype: torch.dtype, rename=lambda name: name) -> Path:
    """A model folder in the published layout, or with published names passed through `rename`."""
    folder.mkdir()
    tensors = {
        rename(published(name)): tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def random_questions(lengths, images, seed: int) -> list[Question]:
    """A question of each length; those in `images` look at a random picture."""
    dice = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, IMAGE_ID, (length,), generator=dice)
        pixels = None
        if index in images:
            start = 2 + index
            ids[start : start + IMAGE_TOKENS] = IMAGE_ID
            pixels = torch.randn(1, 3, 32, 32, generator=dice)
        made.append(Question(ids, pixels))
    return made


def ready(chunk, looks):
    """Samples that need not be prepared, for `Work.prepare`."""
    return list(chunk)


def to_samples(questions):
    """Questions as the package's samples."""
    from nemo_vlm_ptq.families.base import ImageInputs, Sample

    return [
        Sample(
            f"q{index}",
            one.ids,
            one.ids == IMAGE_ID,
            None if one.pixels is None else ImageInputs(one.pixels),
        )
        for index, one in enumerate(questions)
    ]


@torch.no_grad()
def ask_transformers(model, question: Question) -> torch.Tensor:
    """Logits [S,V] of a question asked alone."""
    return model(input_ids=question.ids[None], pixel_values=question.pixels).logits[0]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, of those that the system gives no connection meanwhile."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("localhost", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def main_of(module: str) -> list[str]:
    """Words that make ranks run main() of a module in tests/.

    Not as a script: each rank's checkpoint writer would start by importing all of it once more.
    """
    code = f"import gc; gc.disable(); from {module} import main; gc.enable(); main()"
    return ["--no-python", sys.executable, "-c", code]


def launch(words, ranks: int, timeout: float = PATIENCE) -> tuple[int, str, str]:
    """Start ranks with torchrun on a script, `-m module` or `main_of`; (code, stdout, stderr)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(ranks), *map(str, words)]
    settings = {
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        PORTS: " ".join(map(str, free_ports(6))),
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks
            out, err = process.communicate(timeout=30)
            err += f"\nended after {timeout} s"
    return process.returncode, out, err


def each_layout(layouts):
    """A session of each (tensor, pipeline, data) in turn, in the same launched ranks.

    Each takes a store of its own: in torchrun's the names of the session before still stand.
    """
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for sizes, port in zip(layouts, os.environ[PORTS].split(), strict=False):
        os.environ["MASTER_PORT"] = port
        with parallel_context(dict(zip(("tensor", "pipeline", "data"), sizes, strict=True))) as own:
            yield own


def alone():
    """A session of this process alone."""
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context

    return parallel_context({"tensor": 1, "pipeline": 1, "data": 1})


def load_with_megatron(model, folder: Path) -> None:
    """As other tools load what is saved: with megatron-core's loader, quantizers' state as well."""
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


def run_line(own, workdir: Path) -> None:
    """All stages on the little trained model, all formats, in the layout of a session."""
    from nemo_vlm_ptq.context import RunContext
    from nemo_vlm_ptq.formats import FORMATS, TARGETS
    from nemo_vlm_ptq.planning.plan import make_plan
    from nemo_vlm_ptq.recipe import Recipe
    from nemo_vlm_ptq.stages import run_stages

    recipe = Recipe(
        model=str(TINY_LLAVA),
        workdir=str(workdir),
        parallel=vars(own.layout),
        quantize={"format": tuple(FORMATS)},
        calibration={"data": "scenes", "samples": 12, "micro_batch": 2},
        export={"targets": TARGETS, "tensor": 2},
    )
    run_stages(RunContext(make_plan(recipe), own), STAGES)

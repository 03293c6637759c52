"""Helpers of the reference models: questions, random weights, model folders, logits.

A reference model is a tiny random model of a family in the published layout, and its logits from
transformers' modules, with plain loops for what transformers lacks. The references do not import
the package under test.

Legend: S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

VOCAB = 500
TEXT = {  # allows TP 4, PP 2 and groups of 128 at TP 2; 500 is not a multiple of 64
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Question:
    """Model inputs as the Hugging Face processor of a family returns them; ids: [S]."""

    ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_attention_mask: torch.Tensor | None = None
    image_position_ids: torch.Tensor | None = None


def randomize(module, seed: int):
    """Initialize matrices so that activations stay near 1, and norms so that they are not 1."""
    torch.manual_seed(seed)
    for name, parameter in module.eval().requires_grad_(False).named_parameters():
        if "embed" in name and "patch" not in name:
            parameter.normal_(0, 0.5)
        elif parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def random_ids(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return text ids [count]; 0 to 2 are special tokens, the last id is the image token."""
    return torch.randint(3, VOCAB - 1, (count,), generator=generator)


def tower_tensors(prefix: str, tower) -> dict[str, torch.Tensor]:
    """Return the tensors of a CLIP or SigLIP tower by published name."""
    return {
        f"{prefix}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in tower.state_dict().items()
    }


def write_folder(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """Write config.json and float32 safetensors, with an index for several shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name].contiguous() for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


SIZES = ((50, 70), (20, 90), (61, 24), (30, 41), (64, 64))  # height, width of images


def image_cases(
    ask: Callable[..., Question], sizes: Sequence[tuple[int, int]] = SIZES
) -> dict[str, list[Question]]:
    """Return case -> questions of one batch: several images, text alone, padded.

    Args:
        ask: (words, *sizes of images) -> a question with images of these sizes.
        sizes: of the images in the order of their questions.
    """
    one, two, three, four, five = sizes
    return {
        "images": [ask(5, one), ask(5, two, three)],
        "text": [ask(33), ask(33)],
        "padded": [ask(9, four), ask(12), ask(40, five)],
    }


@torch.no_grad()
def merged_logits(llm, segments) -> torch.Tensor:
    """Return logits [S,V] of concatenated segments: text ids [n] or image features [n,H]."""
    embed = llm.get_input_embeddings()
    parts = [segment if segment.is_floating_point() else embed(segment) for segment in segments]
    return llm(inputs_embeds=torch.cat(parts)[None]).logits[0]


def two_linears(x: torch.Tensor, first, second) -> torch.Tensor:
    """Apply a projector [n,K] -> [n,H]; first and second are (weight, bias)."""
    return functional.linear(functional.gelu(functional.linear(x, *first)), *second)

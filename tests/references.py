"""What the references of the families share: questions, random weights, folders, decoders.

A reference is a tiny random model of a family on disk, as it is published, and what transformers'
own models, with plain loops for what transformers lacks, say with the same weights. Nothing here
or in reference_*.py uses the package. Legend: S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

VOCAB = 500
TEXT = {  # TP 4, PP 2, and groups of 128 at TP 2 fit; 500 is not 64 * n
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
    """As a family's Hugging Face processor gives it: ids [S], and views and sizes of images."""

    ids: torch.Tensor
    views: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


def shake(module, seed: int):
    """The module with weights of a size that keeps signals near 1, and norms that are not 1."""
    torch.manual_seed(seed)
    for name, parameter in module.eval().requires_grad_(False).named_parameters():
        if "embed" in name and "patch" not in name:
            parameter.normal_(0, 0.5)
        elif parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def random_ids(count: int, dice: torch.Generator) -> torch.Tensor:
    """[count] ids of text; 0 to 2 are left to the tokenizer and the last is left to images."""
    return torch.randint(3, VOCAB - 1, (count,), generator=dice)


def tower_tensors(prefix: str, tower) -> dict[str, torch.Tensor]:
    """Tensors of transformers' CLIP or SigLIP under their published names."""
    return {
        f"{prefix}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in tower.state_dict().items()
    }


def write_folder(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """config.json and float32 safetensors, with an index where there are several files."""
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


@torch.no_grad()
def splice(llm, pieces) -> torch.Tensor:
    """Logits [S,V] of pieces in turn: ids [n] of text, or features [n,H] of an image."""
    embed = llm.get_input_embeddings()
    parts = [piece if piece.is_floating_point() else embed(piece) for piece in pieces]
    return llm(inputs_embeds=torch.cat(parts)[None]).logits[0]


def two_linears(x: torch.Tensor, first, second) -> torch.Tensor:
    """A projector [n,K] -> [n,H]; first and second are (weight, bias)."""
    return functional.linear(functional.gelu(functional.linear(x, *first)), *second)

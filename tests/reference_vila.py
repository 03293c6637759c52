"""A tiny VILA-1.5 in its three folders: transformers' SigLIP and Llama, and loops between them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from references import (
    TEXT,
    Question,
    random_ids,
    shake,
    splice,
    tower_tensors,
    two_linears,
    write_folder,
)
from torch.nn import functional

IMAGE = -200  # stands for one image in published ids
SIDE, GRID = 28, 7  # patches along a side are odd, as they are in VILA-1.5
WIDTH = 64
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
LLAMA = TEXT | {"model_type": "llama", "num_hidden_layers": 4, "max_position_embeddings": 4096}
PROJECTOR = {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"}


class Vila:
    """What VILA-1.5 says, on random weights."""

    def __init__(self, seed: int, order: str = "column") -> None:
        from transformers import (
            LlamaConfig,
            LlamaForCausalLM,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        self.order = order
        self.tower = shake(SiglipVisionModel(SiglipVisionConfig(**SIGLIP)), seed)
        self.llm = shake(LlamaForCausalLM(LlamaConfig(**LLAMA)), seed + 1)
        hidden = LLAMA["hidden_size"]
        projector = torch.nn.ModuleDict(
            {
                "1": torch.nn.LayerNorm(4 * WIDTH),
                "2": torch.nn.Linear(4 * WIDTH, hidden),
                "4": torch.nn.Linear(hidden, hidden),
            }
        )
        self.projector = shake(projector, seed + 2).state_dict()

    def _blocks(self, seen: torch.Tensor) -> torch.Tensor:
        """Patches [49,C] -> 2x2 blocks [16,4C], by way of a zero row below and a column right."""
        rows = [[seen[GRID * row + column] for column in range(GRID)] for row in range(GRID)]
        rows.append([torch.zeros(WIDTH)] * GRID)
        rows = [[*row, torch.zeros(WIDTH)] for row in rows]
        half = range(0, GRID + 1, 2)
        if self.order == "column":
            corners = [(top, left) for left in half for top in half]
        else:
            corners = [(top, left) for top in half for left in half]
        return torch.stack(
            [torch.cat(rows[r][c : c + 2] + rows[r + 1][c : c + 2]) for r, c in corners]
        )

    @torch.no_grad()
    def look(self, view: torch.Tensor) -> torch.Tensor:
        """Features [16,H] of an image [3,h,w]."""
        states = self.tower(view[None], output_hidden_states=True).hidden_states
        assert len(states) == 1 + SIGLIP["num_hidden_layers"]
        blocks = self._blocks(states[-2][0])
        weights = [(self.projector[f"{i}.weight"], self.projector[f"{i}.bias"]) for i in (1, 2, 4)]
        normed = functional.layer_norm(blocks, blocks.shape[1:], *weights[0], eps=1e-5)
        return two_linears(normed, *weights[1:])

    def ask(self, question: Question) -> torch.Tensor:
        """Logits [S,V]; S counts every image token."""
        views = iter(() if question.pixel_values is None else question.pixel_values)
        ids = question.ids.split(1)
        return splice(self.llm, [self.look(next(views)) if i == IMAGE else i for i in ids])


def write_vila(folder: Path, seed: int, order: str = "column") -> Vila:
    """A model folder as it is published, and its reference."""
    model = Vila(seed, order)
    whole = {
        "_name_or_path": "Efficient-Large-Model/VILA1.5-tiny",
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "resume_path": "./vlm",  # paths of the machine of its training
        "hidden_size": LLAMA["hidden_size"],
        "mm_hidden_size": WIDTH,
        "image_aspect_ratio": "resize",
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "s2": False,
        "llm_cfg": LLAMA | {"_name_or_path": "./vlm/llm"},
        "vision_tower_cfg": SIGLIP | {"_name_or_path": "./vlm/vision_tower"},
        "mm_projector_cfg": PROJECTOR | {"_name_or_path": "./vlm/mm_projector"},
    }
    if order != "column":
        whole["mm_token_order"] = order
    projector = {f"layers.{name}": tensor for name, tensor in model.projector.items()}
    llama = LLAMA | {"architectures": ["LlamaForCausalLM"]}
    write_folder(folder / "llm", llama, model.llm.state_dict())
    tower = tower_tensors("", model.tower)
    assert "vision_model.head.probe" in tower, "the pool that VILA does not look at"
    write_folder(folder / "vision_tower", SIGLIP, tower)
    write_folder(folder / "mm_projector", PROJECTOR, projector)
    (folder / "config.json").write_text(json.dumps(whole))
    return model


def _question(dice: torch.Generator, *words: int) -> Question:
    """Words between images: 5, 8 is 5 of them, an image, 8 of them."""
    parts = [random_ids(words[0], dice)]
    for count in words[1:]:
        parts += [torch.tensor([IMAGE]), random_ids(count, dice)]
    images = len(words) - 1
    views = torch.randn(images, 3, SIDE, SIDE, generator=dice) if images else None
    return Question(torch.cat(parts), views)


def vila_cases(seed: int, _: Vila) -> dict[str, list[Question]]:
    """Case -> questions that are asked as one batch."""
    dice = torch.Generator().manual_seed(seed)
    return {
        "images": [_question(dice, 5, 20), _question(dice, 3, 0, 6)],
        "text": [_question(dice, 33), _question(dice, 33)],
        "padded": [_question(dice, 9, 7), _question(dice, 12), _question(dice, 2, 4, 9)],
    }

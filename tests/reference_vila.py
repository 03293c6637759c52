"""Reference VILA-1.5: transformers' SigLIP and Llama, with plain loops between them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from references import (
    TEXT,
    Question,
    merged_logits,
    random_ids,
    randomize,
    tower_tensors,
    two_linears,
    write_folder,
)
from torch.nn import functional

IMAGE_PLACEHOLDER = -200
SIDE, GRID = 28, 7  # pixels and patches along a side; the grid is odd, as in VILA-1.5
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
    """VILA-1.5 with random weights; order: "column" or "row", that of the image tokens."""

    def __init__(self, seed: int, order: str = "column") -> None:
        from transformers import (
            LlamaConfig,
            LlamaForCausalLM,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        self.order = order
        self.tower = randomize(SiglipVisionModel(SiglipVisionConfig(**SIGLIP)), seed)
        self.llm = randomize(LlamaForCausalLM(LlamaConfig(**LLAMA)), seed + 1)
        hidden = LLAMA["hidden_size"]
        projector = torch.nn.ModuleDict(
            {
                "1": torch.nn.LayerNorm(4 * WIDTH),
                "2": torch.nn.Linear(4 * WIDTH, hidden),
                "4": torch.nn.Linear(hidden, hidden),
            }
        )
        self.projector = randomize(projector, seed + 2).state_dict()

    def _blocks(self, patches: torch.Tensor) -> torch.Tensor:
        """Merge 2x2 patches, [49,C] -> [16,4C], after padding with a row and a column of zeros."""
        rows = [[patches[GRID * row + column] for column in range(GRID)] for row in range(GRID)]
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
    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the features [16,H] of an image [3,h,w]."""
        states = self.tower(image[None], output_hidden_states=True).hidden_states
        assert len(states) == 1 + SIGLIP["num_hidden_layers"]
        blocks = self._blocks(states[-2][0])
        weights = [(self.projector[f"{i}.weight"], self.projector[f"{i}.bias"]) for i in (1, 2, 4)]
        normed = functional.layer_norm(blocks, blocks.shape[1:], *weights[0], eps=1e-5)
        return two_linears(normed, *weights[1:])

    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V], where S counts every image token."""
        images = iter(() if question.pixel_values is None else question.pixel_values)
        segments = [
            self.encode_image(next(images)) if i == IMAGE_PLACEHOLDER else i
            for i in question.ids.split(1)
        ]
        return merged_logits(self.llm, segments)


def write_vila(folder: Path, seed: int, order: str = "column") -> Vila:
    """Write a model folder in the published layout and return its reference model."""
    model = Vila(seed, order)
    config = {
        "_name_or_path": "Efficient-Large-Model/VILA1.5-tiny",
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "resume_path": "./vlm",  # a path of the training machine, as published
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
        config["mm_token_order"] = order
    projector = {f"layers.{name}": tensor for name, tensor in model.projector.items()}
    llama = LLAMA | {"architectures": ["LlamaForCausalLM"]}
    write_folder(folder / "llm", llama, model.llm.state_dict())
    tower = tower_tensors("", model.tower)
    assert "vision_model.head.probe" in tower, "the pooling head, which VILA does not use"
    write_folder(folder / "vision_tower", SIGLIP, tower)
    write_folder(folder / "mm_projector", PROJECTOR, projector)
    (folder / "config.json").write_text(json.dumps(config))
    return model


def _question(generator: torch.Generator, *words: int) -> Question:
    """Return segments of text with images between them; (5, 8): 5 ids, an image, 8 ids."""
    parts = [random_ids(words[0], generator)]
    for count in words[1:]:
        parts += [torch.tensor([IMAGE_PLACEHOLDER]), random_ids(count, generator)]
    images = len(words) - 1
    pixel_values = torch.randn(images, 3, SIDE, SIDE, generator=generator) if images else None
    return Question(ids=torch.cat(parts), pixel_values=pixel_values)


def vila_cases(seed: int, _: Vila) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": [_question(generator, 5, 20), _question(generator, 3, 0, 6)],
        "text": [_question(generator, 33), _question(generator, 33)],
        "padded": [
            _question(generator, 9, 7),
            _question(generator, 12),
            _question(generator, 2, 4, 9),
        ],
    }

"""Reference Phi-3-vision: transformers' CLIP and Phi-3, with plain loops between them."""

from __future__ import annotations

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

SIDE, GRID = 24, 6  # pixels and patches along a side of a crop
M = GRID // 2  # image tokens along a side of a crop
WIDTH = 48
ORIGINAL = 4096  # length of the longest sequence with short factors
HALF_HEAD_DIM = TEXT["hidden_size"] // TEXT["num_attention_heads"] // 2
CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": SIDE // GRID,
    "projection_dim": 32,
}
ROPE = {
    "short_factor": [1.05 + 0.05 * i for i in range(HALF_HEAD_DIM)],
    "long_factor": [1.1 + 1.5 * i for i in range(HALF_HEAD_DIM)],
}
PHI = TEXT | {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": ORIGINAL,
    "sliding_window": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PUBLISHED = PHI | {
    "architectures": ["Phi3VForCausalLM"],
    "model_type": "phi3_v",
    "auto_map": {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    },
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "hidden_act": "silu",
    "img_processor": {
        "image_dim_out": WIDTH,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": M * M,
        "vision_config": CLIP,  # not in the published config, which implies CLIP-L/14-336
    },
    "rope_scaling": ROPE | {"type": "su"},
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "_attn_implementation": "flash_attention_2",
}


class Phi:
    """Phi-3-vision with random weights."""

    def __init__(self, seed: int) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

        rope = ROPE | {"type": "longrope"}  # named su before Phi-3.5
        config = Phi3Config(**PHI, rope_theta=10000.0, rope_scaling=rope)
        self.tower = randomize(CLIPVisionModel(CLIPVisionConfig(**CLIP)), seed)
        self.llm = randomize(Phi3ForCausalLM(config), seed + 1)
        hidden = TEXT["hidden_size"]
        linears = [torch.nn.Linear(4 * WIDTH, hidden), torch.nn.Linear(hidden, hidden)]
        self.first, self.second = (tuple(randomize(one, seed + 2).parameters()) for one in linears)
        self.glb_GN = torch.randn(1, 1, 4 * WIDTH)
        self.sub_GN = torch.randn(1, 1, 1, 4 * WIDTH)

    @torch.no_grad()
    def encode_image(self, views: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return the features [n,H] of an image with a padded size of height x width pixels."""
        states = self.tower(views, output_hidden_states=True).hidden_states
        assert len(states) == 1 + CLIP["num_hidden_layers"]
        patches = states[-2][:, 1:]

        def token(view: int, row: int, column: int) -> torch.Tensor:
            corner = 2 * row * GRID + 2 * column
            return torch.cat([patches[view, corner + i] for i in (0, 1, GRID, GRID + 1)])

        tokens = []
        columns = width // SIDE
        for crop_row in range(height // SIDE):
            for row in range(M):
                for crop_column in range(columns):
                    crop = 1 + crop_row * columns + crop_column
                    tokens += [token(crop, row, column) for column in range(M)]
                tokens.append(self.sub_GN.flatten())
        tokens.append(self.glb_GN.flatten())
        for row in range(M):
            tokens += [token(0, row, column) for column in range(M)]
            tokens.append(self.sub_GN.flatten())
        return two_linears(torch.stack(tokens), self.first, self.second)

    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V]."""
        segments, rest = [], question.ids
        images = (
            []
            if question.pixel_values is None
            else zip(question.pixel_values, question.image_sizes, strict=True)
        )
        for index, (views, (height, width)) in enumerate(images):
            features = self.encode_image(views, int(height), int(width))
            start = int((rest == -1 - index).nonzero()[0])
            stop = start + len(features)
            assert (rest[start:stop] == -1 - index).all()
            segments += [rest[:start], features]
            rest = rest[stop:]
        assert (rest >= 0).all()
        return merged_logits(self.llm, [*segments, rest])


def write_phi(folder: Path, seed: int) -> Phi:
    """Write a model folder in the published layout and return its reference model."""
    model = Phi(seed)
    embed = "model.vision_embed_tokens."
    tensors = {
        **model.llm.state_dict(),
        **tower_tensors(embed + "img_processor.", model.tower),
        embed + "glb_GN": model.glb_GN,
        embed + "sub_GN": model.sub_GN,
        embed + "img_projection.0.weight": model.first[0],
        embed + "img_projection.0.bias": model.first[1],
        embed + "img_projection.2.weight": model.second[0],
        embed + "img_projection.2.bias": model.second[1],
    }
    write_folder(folder, PUBLISHED, tensors, shards=2)
    return model


def token_count(rows: int, columns: int) -> int:
    """Return the number of tokens of an image of rows x columns crops."""
    return (rows * columns + 1) * M * M + 1 + (rows + 1) * M


def _question(
    generator: torch.Generator, words: int, *grids: tuple[int, int], crops: int = 6
) -> Question:
    """Return `words` ids of text, then images of (rows, columns) crops, each followed by text."""
    parts = [torch.tensor([1]), random_ids(words - 1, generator)]
    for index, (rows, columns) in enumerate(grids):
        parts.append(torch.full((token_count(rows, columns),), -1 - index))
        parts += [torch.tensor([1]), random_ids(4, generator)]
    ids = torch.cat(parts)
    if not grids:
        return Question(ids)
    pixel_values = torch.full((len(grids), crops + 1, 3, SIDE, SIDE), 9.0)  # 9 in padding views
    for views, (rows, columns) in zip(pixel_values, grids, strict=True):
        views[: rows * columns + 1].normal_(generator=generator)
    return Question(ids=ids, pixel_values=pixel_values, image_sizes=torch.tensor(grids) * SIDE)


def phi_cases(seed: int, _: Phi) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": [_question(generator, 5, (2, 3)), _question(generator, 5, (1, 4), (3, 1))],
        "text": [_question(generator, 33), _question(generator, 33)],
        "padded": [
            _question(generator, 9, (2, 1)),
            _question(generator, 12),
            _question(generator, 30, (1, 1)),
        ],
        "short factors": [_question(generator, ORIGINAL)],
        "long factors": [_question(generator, ORIGINAL + 1)],
    }

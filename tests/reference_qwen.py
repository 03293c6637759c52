"""Reference Qwen-VL models: transformers' models with random weights in the published layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from references import TEXT, VOCAB, Question, image_cases, random_ids, randomize, write_folder

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 4
PATCH, MERGE, DEEPSTACK_LAYERS = 8, 2, 2
SIZE = {"shortest_edge": 24**2, "longest_edge": 64**2}  # pixels of an image
LAYERS = TEXT | {"max_position_embeddings": 4096, "head_dim": 32}
TOWER = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": TEXT["hidden_size"],
}
KINDS = {  # family and variant -> class of transformers, config of the text, of the tower
    "qwen3_vl": (
        "Qwen3VL",
        {"rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]},
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "rope_theta": 1e7,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
        {"num_position_embeddings": 36},
    ),
    "qwen2_vl": (
        "Qwen2_5_VL",
        {"rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        {"window_size": 32, "fullatt_block_indexes": [1, 3]},
    ),
    "qwen2_vl 2.0": (
        "Qwen2VL",
        {"rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        {"embed_dim": 64, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2},
    ),
}

DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4,
}  # fmt: skip
TEXTS = {
    "qwen3_5": DELTA_NET | {"full_attention_interval": 2},
    "qwen3_vl": {"num_hidden_layers": 4},  # two stages, of which the first has those of deepstack
}
MTP = "mtp.fc.weight"  # of layers that transformers ignores


class QwenVL:
    """A Qwen-VL model with random weights; the head is tied unless told."""

    def __init__(self, seed: int, kind: str, *, tied: bool = True) -> None:
        import transformers

        name, rope, tower = KINDS[kind]
        text = TEXTS.get(kind, {})
        config = getattr(transformers, f"{name}Config")(
            text_config=LAYERS | text | {"rope_parameters": {"rope_type": "default"} | rope},
            vision_config=TOWER | tower,
            image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            tie_word_embeddings=tied,
            architectures=[f"{name}ForConditionalGeneration"],
        )
        torch.manual_seed(seed)
        self.kind = kind
        self.model = randomize(getattr(transformers, config.architectures[0])(config), seed)
        if kind == "qwen3_5":
            _condition(self.model)
        if tied:
            self.model.tie_weights()

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return logits [S,V]."""
        images = {}
        if question.pixel_values is not None:
            images = {
                "pixel_values": question.pixel_values,
                "image_grid_thw": question.image_grid_thw,
            }
        ids = question.ids[None]
        types = (ids == IMAGE_TOKEN).int()
        return self.model(input_ids=ids, mm_token_type_ids=types, **images).logits[0]


def _condition(model) -> None:
    """Make keys alike to queries: the recurrence of random ones amplifies rounding errors."""
    for name, parameter in model.named_parameters():
        if name.endswith(("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight")):
            width = DELTA_NET["linear_num_key_heads"] * DELTA_NET["linear_key_head_dim"]
            query, key = parameter.data[:width], parameter.data[width : 2 * width]
            key.mul_(0.3).add_(query)


def published_tensors(reference: QwenVL) -> dict[str, torch.Tensor]:
    """Return the tensors by the names of published checkpoints."""
    tensors = {}
    tied = reference.model.config.tie_word_embeddings
    for name, tensor in reference.model.state_dict().items():
        if not reference.kind.startswith("qwen3"):
            name = name.replace("model.language_model.", "model.").replace(
                "model.visual.", "visual."
            )
        if name != "lm_head.weight" or not tied:
            tensors[name] = tensor
    if reference.kind == "qwen3_5":
        tensors[MTP] = torch.ones(4, 8)
    return tensors


def published_config(reference: QwenVL) -> dict:
    """Return config.json; older ones have the keys of the decoder on the first level."""
    config = reference.model.config.to_dict()
    if reference.kind.startswith("qwen3"):
        return config
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    own = {"model_type", "architectures", "dtype", "tie_word_embeddings"}
    text = {key: value for key, value in text.items() if key not in own}
    return text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def write_qwen(folder: Path, seed: int, kind: str, *, tied: bool = True) -> QwenVL:
    """Write a model folder in the published layout and return its reference model."""
    reference = QwenVL(seed, kind, tied=tied)
    write_folder(folder, published_config(reference), published_tensors(reference))
    return reference


def _question(generator: torch.Generator, words: int, *sizes: tuple[int, int]) -> Question:
    """Return `words` ids of text, then images of (height, width), each followed by text."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    parts = [random_ids(words, generator).clamp(max=VISION_END - 1)]
    if not sizes:
        return Question(parts[0])
    processor = Qwen2VLImageProcessorPil(
        size=dict(SIZE), patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2
    )
    images = [
        torch.randint(0, 256, (*size, 3), generator=generator).numpy().astype(np.uint8)
        for size in sizes
    ]
    inputs = processor(images, return_tensors="pt")
    for grid in inputs["image_grid_thw"]:
        count = int(grid.prod()) // MERGE**2
        text = random_ids(4, generator).clamp(max=VISION_END - 1)
        parts += [
            torch.tensor([VISION_START]),
            torch.full((count,), IMAGE_TOKEN),
            torch.tensor([VISION_END]),
            text,
        ]
    return Question(
        ids=torch.cat(parts),
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
    )


def qwen_cases(seed: int, _: QwenVL) -> dict[str, list[Question]]:
    """Return case -> questions of one batch."""
    generator = torch.Generator().manual_seed(seed)
    return image_cases(partial(_question, generator))

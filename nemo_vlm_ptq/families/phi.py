"""Phi-3-vision and Phi-3.5-vision: CLIP-L over crops of an image (HD transform), a Phi-3 decoder.

q, k and v are one tensor, gate and up another; rotary frequencies change after 4,096 positions.
The config says nothing of CLIP's sizes: they are those of CLIP-L/14-336, unless
img_processor.vision_config names others.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import (
    Config,
    Decoder,
    ImageInputs,
    ImagePlaceholders,
    LongRope,
    ModelFamily,
    Preprocess,
    Sample,
    check_placeholder_count,
)
from nemo_vlm_ptq.families.shared import (
    COMPUTED_ROTARY,
    decoder_from_sizes,
    llama_parameter_map,
    load_tokenizer,
    require_file,
    require_values,
)
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_FEATURE_LAYER = -2  # hidden state of CLIP that is looked at
STOP_TOKENS = (
    32000,
    32001,
    32007,
)  # <|endoftext|>, <|assistant|>, <|end|> of the published tokenizer
PUBLISHED_VOCAB = 32064
PLACEHOLDER = re.compile(r"<\|image_\d+\|>")
LONG_ROPE_TYPES = ("su", "longrope")  # two names of one kind of rotary scaling
ROPE_FACTOR_KEYS = ("short_factor", "long_factor")
ROPE_KEYS = {"type", "rope_type", "rope_theta", "factor", *ROPE_FACTOR_KEYS}
ROPE_KEYS |= {"original_max_position_embeddings", "partial_rotary_factor"}
IGNORED_TENSORS = (
    COMPUTED_ROTARY,
    IgnoredTensor(r".*\.embeddings\.position_ids", "counts up from 0"),
    IgnoredTensor(
        r"model\.vision_embed_tokens\.wte\.weight", "the same tensor as model.embed_tokens"
    ),
)


def text_config(config: Config) -> Any:
    """transformers' Phi3Config of the decoder."""
    from transformers import Phi3Config

    foreign = ("model_type", "architectures", "auto_map", "embd_layer", "img_processor")
    own = {key: value for key, value in config.items() if key not in foreign}
    own = copy.deepcopy({key: value for key, value in own.items() if key[0] != "_"})
    eos = own.get("eos_token_id", 32000)
    stops = dict.fromkeys(eos if isinstance(eos, list) else [eos])
    if own.get("vocab_size", PUBLISHED_VOCAB) == PUBLISHED_VOCAB:
        stops |= dict.fromkeys(STOP_TOKENS)
    own |= {"eos_token_id": list(stops), "pad_token_id": own.get("pad_token_id")}
    for key in ("rope_scaling", "rope_parameters"):
        if rope := own.get(key):  # transformers 5 has other names for the same
            rope["rope_type"] = (
                "longrope" if rope_kind(rope) in LONG_ROPE_TYPES else rope_kind(rope)
            )
            rope.pop("type", None)
            rope.setdefault("original_max_position_embeddings", original_positions(config))
            rope["factor"] = position_ratio(config)
    return Phi3Config.from_dict(own)


def rope_kind(rope: Mapping[str, Any]) -> str:
    """The kind of rotary scaling under any of its names."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def original_positions(config: Config) -> int:
    """Positions up to which the short factors hold."""
    return int(config.get("original_max_position_embeddings", 4096))


def position_ratio(config: Config) -> float:
    """Positions of the long context over those of the short one."""
    return float(config.get("max_position_embeddings", 4096) / original_positions(config))


def decoder(config: Config) -> Decoder:
    """Facts of the decoder.

    Raises:
        UserError: the config asks for something that Phi-3-vision does not do.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    _check_rope(config, rope)
    text = text_config(config)
    embed, images = config.get("embd_layer") or {}, config.get("img_processor") or {}
    require_values(
        "phi",
        {
            "tie_word_embeddings": (text.tie_word_embeddings, False),
            "hidden_act": (text.hidden_act, "silu"),
            "partial_rotary_factor": (text.rope_parameters.get("partial_rotary_factor", 1.0), 1.0),
            "embd_layer.use_hd_transform": (embed.get("use_hd_transform"), True),
            "embd_layer.hd_transform_order": (embed.get("hd_transform_order"), "sub_glb"),
            "embd_layer.with_learnable_separator": (embed.get("with_learnable_separator"), True),
            "embd_layer.projection_cls": (embed.get("projection_cls"), "mlp"),
            "img_processor.name": (images.get("name"), "clip_vision_model"),
            "img_processor.layer_idx": (
                images.get("layer_idx", CLIP_FEATURE_LAYER),
                CLIP_FEATURE_LAYER,
            ),
            "img_processor.type_feature": (images.get("type_feature", "patch"), "patch"),
            "img_processor.image_dim_out": (
                images.get("image_dim_out"),
                tower_config(config)["hidden_size"],
            ),
        },
    )
    facts = decoder_from_sizes("phi", text, text.rope_parameters.get("rope_theta", 10000.0))
    if rope_kind(rope) not in LONG_ROPE_TYPES:
        return facts
    original, ratio = original_positions(config), position_ratio(config)
    scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    short, long = (tuple(rope[key]) for key in ROPE_FACTOR_KEYS)
    return replace(facts, long_rope=LongRope(short, long, original, scale))


def _check_rope(config: Config, rope: Mapping[str, Any]) -> None:
    """Refuse rotary scaling that is not su / longrope as published, before transformers does.

    Raises:
        UserError: another kind, unknown settings, or factors that do not fit the heads.
    """
    kind = rope_kind(rope)
    if kind not in ("default", *LONG_ROPE_TYPES):
        raise UserError(
            f"phi: rope type is {kind!r}; supported: {', '.join(LONG_ROPE_TYPES)}, or none"
        )
    if unknown := sorted(set(rope) - ROPE_KEYS):
        raise UserError(f"phi: rope_scaling.{unknown[0]} is not known")
    half = config.get("hidden_size", 3072) // config.get("num_attention_heads", 32) // 2
    for key in ROPE_FACTOR_KEYS if kind in LONG_ROPE_TYPES else ():
        count = len(rope.get(key) or ())
        if count != half:
            raise UserError(f"phi: rope_scaling.{key} has {count} factors; the heads need {half}")


def tower_config(config: Config) -> dict[str, Any]:
    """Sizes of CLIP."""
    given = (config.get("img_processor") or {}).get("vision_config")
    return dict(given or CLIP_L)


def make_vision_module(config: Config) -> Any:
    """Tower, separators and projector, unfilled."""
    from nemo_vlm_ptq.families.phi_vision import PhiVision

    return PhiVision(tower_config(config), config.get("hidden_size", 3072), CLIP_FEATURE_LAYER)


def token_counts(config: Config, sizes: Any) -> list[int]:
    """Tokens of each image of `sizes` [images,2], padded heights and widths."""
    from nemo_vlm_ptq.families.phi_vision import token_count

    tower = tower_config(config)
    side = tower["image_size"]
    m = side // tower["patch_size"] // 2
    return [token_count(int(height), int(width), side, m) for height, width in sizes]


def find_placeholders(config: Config, ids: Any, pixels: ImageInputs | None) -> ImagePlaceholders:
    """Published ids have -i for each token of image i of the row.

    Raises:
        UserError: their number is not that of the images.
    """
    images = max(0, -int(ids.min()))
    sizes = None if pixels is None else pixels.image_sizes
    if images and sizes is None:
        raise UserError("inputs must hold pixel_values and image_sizes [images,2], padded")
    counts = [] if sizes is None else token_counts(config, sizes[:images])
    found = [int((ids == -1 - index).sum()) for index in range(images)]
    if found != counts:
        raise UserError(f"{found} image tokens; the images left take {counts}")
    return ImagePlaceholders(ids < 0, 1, images)


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """A function (id, question, image, answer) -> Sample in Phi-3-vision's prompt.

    Pieces of the prompt beside an image are tokenized apart, each with a <s> of its own, as the
    published processor does.
    """
    import torch

    from nemo_vlm_ptq.families.phi_vision import crop_image

    tokens = load_tokenizer(folder)
    settings = read_json_object(require_file(folder, "preprocessor_config.json"))
    crops, side = settings["num_crops"], tower_config(config)["image_size"]
    mean, std = settings["image_mean"], settings["image_std"]

    def prepare(name: str, question: str, image: Any = None, answer: str = "") -> Sample:
        if image is not None and not isinstance(image, ImageInputs):
            views, size = crop_image(image, crops, side, mean, std)
            image = ImageInputs(views[None], torch.tensor([size]))
        mark = "<|image_1|>\n" if image is not None else ""
        text = f"<|user|>\n{mark}{question}<|end|>\n<|assistant|>\n{answer}"
        counts = [] if image is None else token_counts(config, image.image_sizes)
        first, *rest = PLACEHOLDER.split(text)
        check_placeholder_count(name, len(rest), len(counts))
        ids: list[int] = tokens(first)["input_ids"]
        for index, (count, chunk) in enumerate(zip(counts, rest, strict=True), 1):
            ids += [-index] * count + tokens(chunk)["input_ids"]
        input_ids = torch.tensor(ids)
        return Sample(name, input_ids, input_ids < 0, image)

    return prepare


FAMILY = ModelFamily(
    name="phi",
    architectures=("Phi3VForCausalLM",),
    decoder_prefix="",
    trtllm_architecture="Phi3ForCausalLM",
    parameter_map=llama_parameter_map(
        "", ("self_attn.qkv_proj.weight",), ("mlp.gate_up_proj.weight",)
    ),
    name_aliases=(),
    ignored_tensors=IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="phi-3-vision",
)

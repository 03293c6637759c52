"""Phi-3-vision and Phi-3.5-vision: CLIP on crops of the image (HD transform), a Phi-3 decoder.

q, k and v are one tensor, gate and up another. Rotary frequencies change after 4,096 positions.
The published configs do not hold the sizes of CLIP: they are those of CLIP-L/14-336, unless
img_processor.vision_config has others.

Legend: S side of a crop in pixels, g patches and m = g/2 image tokens along a side of a crop,
C channels of CLIP, H hidden size of the decoder.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import (
    Config,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
)
from nemo_vlm_ptq.families.chat_template import prompt_renderer
from nemo_vlm_ptq.families.config_checks import check_tower_sizes, require_values
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.families.hd_transform import crop_image, token_count
from nemo_vlm_ptq.families.image_processor import read_settings
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, decoder_from_sizes, llama_parameter_map
from nemo_vlm_ptq.families.long_rope import read_long_rope, to_transformers_5
from nemo_vlm_ptq.families.placeholders import check_placeholder_count
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.towers import merge_patches, select_hidden_states, tower_parameters
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_FEATURE_LAYER = -2  # index of the hidden state that the features are read from
EMBED_PREFIX = "model.vision_embed_tokens."
STOP_TOKEN_IDS = (32000, 32001, 32007)  # <|endoftext|>, <|assistant|>, <|end|> as published
PUBLISHED_VOCAB = 32064
PROMPT = "<|user|>\n{image}{question}<|end|>\n<|assistant|>\n"
PLACEHOLDER = re.compile(r"<\|image_\d+\|>")
IGNORED_TENSORS = (
    ROTARY_INV_FREQ,
    IgnoredTensor(pattern=r".*\.embeddings\.position_ids", reason="the integers from 0"),
    IgnoredTensor(
        pattern=r"model\.vision_embed_tokens\.wte\.weight",
        reason="the same tensor as model.embed_tokens",
    ),
)


class PhiVision(nn.Module):
    """CLIP vision tower, separators and projector of Phi-3-vision.

    Args:
        tower: values of transformers' CLIPVisionConfig.
        hidden: H.
        feature_layer: index of the hidden state that the features are read from.
    """

    def __init__(self, tower: dict[str, Any], hidden: int, feature_layer: int) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(**tower)
        self.feature_layer, self.side = feature_layer, int(tower["image_size"])
        self.vision_tower = CLIPVisionModel(config)
        width = 4 * config.hidden_size
        self.glb_GN = nn.Parameter(torch.empty(1, 1, width))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, width))
        self.img_projection = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, concatenated.

        pixel_values [images,1+crops,3,S,S] are padded to the largest number of crops.
        """
        assert images.image_sizes is not None
        features = []
        for views, (height, width) in zip(images.pixel_values, images.image_sizes, strict=True):
            rows, columns = int(height) // self.side, int(width) // self.side
            image_views = views[None, : rows * columns + 1]
            features.append(self.encode_views(image_views, rows, columns)[0])
        return torch.cat(features)

    def encode_views(self, views: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Encode the global view and the crops of images with the same grid of crops.

        Args:
            views: [n,1+rows*columns,3,S,S], global view first.
            rows: rows of crops.
            columns: columns of crops.

        Returns:
            Features [n,tokens,H] of the crops, a separator, and the global view.
        """
        n = len(views)
        states = select_hidden_states(self.vision_tower, views.flatten(0, 1), self.feature_layer)
        patches = states[:, 1:]
        g = round(patches.shape[1] ** 0.5)
        blocks = merge_patches(patches.unflatten(1, (g, g))).unflatten(0, (n, -1))
        m = blocks.shape[2]
        crops = blocks[:, 1:].unflatten(1, (rows, columns)).transpose(2, 3)
        parts = [
            self._append_separators(crops.reshape(n, rows * m, columns * m, -1)),
            self.glb_GN.expand(n, 1, -1),
            self._append_separators(blocks[:, 0]),
        ]
        return self.img_projection(torch.cat(parts, dim=1))

    def _append_separators(self, grid: torch.Tensor) -> torch.Tensor:
        """Append a separator to each row and flatten: [n,h,w,4C] -> [n,h*(w+1),4C]."""
        separators = self.sub_GN.expand(*grid.shape[:2], 1, -1)
        return torch.cat([grid, separators], dim=2).flatten(1, 2)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        others = {
            EMBED_PREFIX + name: tensor
            for name, tensor in self.named_parameters()
            if not name.startswith("vision_tower.")
        }
        return tower_parameters(EMBED_PREFIX + "img_processor.", self.vision_tower) | others


def text_config(config: Config) -> Any:
    """Return transformers' Phi3Config of the decoder."""
    from transformers import Phi3Config

    excluded = ("model_type", "architectures", "auto_map", "embd_layer", "img_processor")
    values = {key: value for key, value in config.items() if key not in excluded}
    values = copy.deepcopy({key: value for key, value in values.items() if key[0] != "_"})
    eos = values.get("eos_token_id", 32000)
    stop_ids = dict.fromkeys(eos if isinstance(eos, list) else [eos])
    if values.get("vocab_size", PUBLISHED_VOCAB) == PUBLISHED_VOCAB:
        stop_ids |= dict.fromkeys(STOP_TOKEN_IDS)
    values |= {"eos_token_id": list(stop_ids), "pad_token_id": values.get("pad_token_id")}
    for key in ("rope_scaling", "rope_parameters"):
        if rope := values.get(key):
            values[key] = to_transformers_5(config, rope)
    return Phi3Config.from_dict(values)


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    from transformers import CLIPVisionConfig

    long_rope = read_long_rope(config)  # before transformers parses it: its messages are unclear
    text = text_config(config)
    embed, images = config.get("embd_layer") or {}, config.get("img_processor") or {}
    layer = images.get("layer_idx", CLIP_FEATURE_LAYER)
    tower = CLIPVisionConfig(**tower_config(config))
    check_tower_sizes("phi", tower)
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
            "img_processor.layer_idx": (layer, CLIP_FEATURE_LAYER),
            "img_processor.type_feature": (images.get("type_feature", "patch"), "patch"),
            "img_processor.image_dim_out": (images.get("image_dim_out"), tower.hidden_size),
        },
    )
    base = decoder_from_sizes("phi", text, text.rope_parameters.get("rope_theta", 10000.0))
    return replace(base, long_rope=long_rope)


def tower_config(config: Config) -> dict[str, Any]:
    """Return the values of CLIPVisionConfig."""
    vision_config = (config.get("img_processor") or {}).get("vision_config")
    return dict(vision_config or CLIP_L_336)


def make_vision_module(config: Config) -> PhiVision:
    """Return the vision module, uninitialized."""
    return PhiVision(tower_config(config), config.get("hidden_size", 3072), CLIP_FEATURE_LAYER)


def token_counts(config: Config, image_sizes: Any) -> list[int]:
    """Return the number of tokens of each image, from padded sizes [images,2]."""
    tower = tower_config(config)
    side = tower["image_size"]
    m = side // tower["patch_size"] // 2
    return [token_count(int(height), int(width), side, m) for height, width in image_sizes]


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens; published ids have -i for each token of image i of the sample.

    Raises:
        UserError: their number is not that of the next images.
    """
    num_images = max(0, -int(ids.min()))
    sizes = None if images is None else images.image_sizes
    if num_images and sizes is None:
        raise UserError("inputs must hold pixel_values and image_sizes [images,2], padded")
    counts = [] if sizes is None else token_counts(config, sizes[:num_images])
    found = [int((ids == -1 - index).sum()) for index in range(num_images)]
    if found != counts:
        raise UserError(f"got {found} image tokens; the remaining images take {counts}")
    return ImagePlaceholders(is_image=ids < 0, tokens_per_placeholder=1, num_images=num_images)


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of Phi-3-vision by default.

    The texts before and after an image are tokenized separately, each with <s>, as in the
    published processor.
    """
    tokenizer = load_tokenizer(folder)
    path, settings = read_settings(folder)
    for key in ("num_crops", "image_mean", "image_std"):
        if settings.get(key) is None:
            raise UserError(f"{path} has no {key}; it is required to preprocess images")
    crops, side = settings["num_crops"], tower_config(config)["image_size"]
    mean, std = settings["image_mean"], settings["image_std"]
    render = prompt_renderer(folder, tokenizer, PROMPT, "<|image_1|>")

    def process(image: Any) -> ImageInputs:
        views, size = crop_image(image, crops, side, mean, std)
        return ImageInputs(pixel_values=views[None], image_sizes=torch.tensor([size]))

    def preprocess(
        sample_id: str, question: str, images: Any = None, answer: str = "", **_: Any
    ) -> Sample:
        parts = process_images(images, process)
        joined = join_images(parts)
        prompt = render(question, len(parts), answer)
        counts = [] if joined is None else token_counts(config, joined.image_sizes)
        first, *rest = PLACEHOLDER.split(prompt)
        check_placeholder_count(sample_id, len(rest), len(counts))
        ids: list[int] = tokenizer(first)["input_ids"]
        for index, (count, text) in enumerate(zip(counts, rest, strict=True), 1):
            ids += [-index] * count + tokenizer(text)["input_ids"]
        input_ids = torch.tensor(ids)
        return Sample(sample_id, input_ids, input_ids < 0, joined)

    return preprocess


FAMILY = ModelFamily(
    name="phi",
    architectures=("Phi3VForCausalLM",),
    body_prefix="model.",
    head_prefix="lm_head.",
    trtllm_architecture="Phi3ForCausalLM",
    parameter_map=partial(
        llama_parameter_map,
        body="model.",
        head="lm_head.",
        qkv=("self_attn.qkv_proj.weight",),
        gate_up=("mlp.gate_up_proj.weight",),
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

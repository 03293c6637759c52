"""Mistral Small 3.1 and 3.2, Ministral 3, Pixtral: a Pixtral tower for images of any size.

The projector merges patches, but for Pixtral, whose class is that of LLaVA.

Parameters have the names of the published checkpoints; NAME_ALIASES maps those of transformers in
memory to them. Image tokens stand in rows: [IMG] ... [IMG_BREAK], and [IMG_END] after the last.
"""

from __future__ import annotations

import math
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
from nemo_vlm_ptq.families.chat_template import prompt_renderer, tokenize_prompt
from nemo_vlm_ptq.families.config_checks import (
    check_feature_layer,
    check_token_id,
    check_tower_sizes,
    require_positive,
    require_values,
)
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.image_processor import load_any_size_processor
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, llama_parameter_map
from nemo_vlm_ptq.families.placeholders import check_placeholder_count, images_of_tokens
from nemo_vlm_ptq.families.scaled_rope import scaled_rope_decoder
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.tied_head import make_config_completer
from nemo_vlm_ptq.families.towers import select_hidden_states

BODY_PREFIX, HEAD_PREFIX = "language_model.model.", "language_model.lm_head."
NAME_ALIASES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)
ROPE_TYPES = {"mistral": ("default",), "ministral3": ("yarn",)}  # of each decoder
SCALING = "llama_4_scaling_beta"
IMAGE, ROW_END, IMAGE_END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"

full_config = full_config_reader("Mistral3Config", "LlavaConfig")
text_config = text_config_reader(full_config)


class Mistral3Vision(nn.Module):
    """Pixtral tower and projector."""

    def __init__(self, config: Any) -> None:
        from transformers import PixtralVisionModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
        from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

        super().__init__()
        self.feature_layer = config.vision_feature_layer
        self.merges = config.model_type == "mistral3"
        self.vision_tower = PixtralVisionModel(config.vision_config)
        kind = Mistral3MultiModalProjector if self.merges else LlavaMultiModalProjector
        self.multi_modal_projector = kind(config)

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, row by row."""
        assert images.image_sizes is not None
        sizes = [tuple(size) for size in images.image_sizes.tolist()]
        tower = partial(self.vision_tower, image_sizes=sizes)
        states = select_hidden_states(tower, images.pixel_values, self.feature_layer)
        patches = states.squeeze(0)
        return self.multi_modal_projector(patches, *([sizes] if self.merges else []))

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        return dict(self.named_parameters())


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Ministral 3 scales queries from original_max_position_embeddings on. Longer sequences are
    rejected, as the decoder has no more positions.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    vision, text = full.vision_config, full.text_config
    require_values(FAMILY.name, {"vision_config.model_type": (vision.model_type, "pixtral")})
    if text.model_type not in ROPE_TYPES:
        raise UserError(
            f"{FAMILY.name}: text_config.model_type is {text.model_type!r}; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )
    check_token_id(FAMILY.name, "image_token_index", full.image_token_index)
    check_tower_sizes(FAMILY.name, vision)
    check_feature_layer(FAMILY.name, full.vision_feature_layer, vision.num_hidden_layers)
    merge = getattr(full, "spatial_merge_size", 1)
    require_positive(FAMILY.name, {"spatial_merge_size": merge}, int)
    if full.model_type == "llava":
        strategy = full.vision_feature_select_strategy
        require_values(FAMILY.name, {"vision_feature_select_strategy": (strategy, "full")})
    found = scaled_rope_decoder(FAMILY.name, config, text, ROPE_TYPES[text.model_type])
    if text.model_type == "mistral":
        return found
    rope = text.rope_parameters
    beta = {f"rope_parameters.{SCALING}": rope.get(SCALING)}
    require_positive(FAMILY.name, beta, float)
    unscaled = min(found.max_positions, rope["original_max_position_embeddings"])
    return replace(found, max_positions=unscaled)


def make_vision_module(config: Config) -> Mistral3Vision:
    """Return the vision module, uninitialized."""
    return Mistral3Vision(full_config(config))


def patch_pixels(full: Any) -> int:
    """Return the height and width in pixels that become one token."""
    return int(full.vision_config.patch_size * getattr(full, "spatial_merge_size", 1))


def complete_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with tie_word_embeddings as the checkpoint has it.

    Without the key the class Mistral3 ties the head, and LLaVA's does not.
    """
    default = config.get("model_type") != "llava"
    return make_config_completer(HEAD_PREFIX, NAME_ALIASES, default=default)(folder, config)


def pixels_per_token(config: Config) -> int:
    """Return the pixels of an image that become one token."""
    return patch_pixels(full_config(config)) ** 2


def token_counts(image_sizes: torch.Tensor | None, side: int) -> list[int]:
    """Return the image tokens of each image, without those that end rows.

    Raises:
        UserError: there are no sizes.
    """
    if image_sizes is None:
        raise UserError("pixel_values need image_sizes [images,2]")
    return [int(count) for count in (image_sizes // side).prod(dim=1)]


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not that of the next images.
    """
    full = full_config(config)
    counts = [] if images is None else token_counts(images.image_sizes, patch_pixels(full))
    return images_of_tokens(ids == full.image_token_index, counts, "image_sizes")


def bounded_edge(size: tuple[int, int], side: int, longest: int, max_pixels: int) -> int:
    """Return the longest edge with which an image has at most `max_pixels`, at least `side`.

    The processor rounds both edges up to a multiple of `side`.
    """
    longest = min(longest, max(size))
    while longest > side:
        edges = [int(edge * longest / max(size)) for edge in size]
        if math.prod(-(-edge // side) * side for edge in edges) <= max_pixels:
            break
        longest -= side
    return max(longest, side)


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples with the folder's chat template."""
    tokenizer, full = load_tokenizer(folder), full_config(config)
    side, image_id = patch_pixels(full), full.image_token_index
    processor = load_any_size_processor(folder, ("PixtralImageProcessor",))
    longest, most = processor.size["longest_edge"], full.vision_config.image_size
    if longest > most:
        raise UserError(
            f"{folder}: the image processor does not match the vision tower: size has longest_edge "
            f"{longest}, and vision_config.image_size is {most}"
        )
    render = prompt_renderer(folder, tokenizer, None, IMAGE)
    if tokenizer.convert_tokens_to_ids(IMAGE) != image_id:
        raise UserError(f"{folder}: the tokenizer's {IMAGE} is not image_token_index {image_id}")

    def image_text(image: ImageInputs, following: str) -> str:
        assert image.image_sizes is not None
        rows, columns = (image.image_sizes[0] // side).tolist()
        row = IMAGE * columns
        return (row + ROW_END) * (rows - 1) + row + IMAGE_END + following

    def process(image: Any, max_pixels: int | None) -> ImageInputs:
        edge = longest
        if max_pixels is not None:
            edge = bounded_edge(image.size, side, longest, max_pixels)
        processed = processor(
            image,
            size={"longest_edge": edge},
            patch_size=side,
            return_tensors="pt",
        )
        return ImageInputs(processed["pixel_values"], torch.tensor(processed["image_sizes"]))

    def preprocess(
        sample_id: str,
        question: str,
        images: Any = None,
        answer: str = "",
        *,
        max_pixels: int | None = None,
    ) -> Sample:
        parts = process_images(images, partial(process, max_pixels=max_pixels))
        text = render(question, len(parts), answer)
        check_placeholder_count(sample_id, text.count(IMAGE), len(parts))
        first, *rest = text.split(IMAGE)
        text = first + "".join(image_text(*pair) for pair in zip(parts, rest, strict=True))
        input_ids = torch.tensor(tokenize_prompt(tokenizer, text), dtype=torch.int64)
        is_image = input_ids == image_id
        return Sample(sample_id, input_ids, is_image, join_images(parts))

    return preprocess


FAMILY = ModelFamily(
    name="mistral3",
    architectures=("Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration"),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=NAME_ALIASES,
    ignored_tensors=(ROTARY_INV_FREQ,),
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="",
    pixels_per_token=pixels_per_token,
    tower="pixtral",
    complete_config=complete_config,
)

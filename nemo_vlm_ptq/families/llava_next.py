"""LLaVA-NeXT (LLaVA-1.6): the modules of LLaVA-1.5, with images split into tiles (anyres).

The decoder is Vicuna's Llama or Mistral. Parameters have the names of the published
llava-v1.6-*-hf checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.families.base import (
    Config,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
)
from nemo_vlm_ptq.families.chat_template import Render, prompt_renderer, tokenize_prompt
from nemo_vlm_ptq.families.config_checks import check_token_id
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.image_processor import load_image_processor
from nemo_vlm_ptq.families.llama import llama_decoder, llama_parameter_map
from nemo_vlm_ptq.families.placeholders import expand_placeholders
from nemo_vlm_ptq.families.several_images import join_images, process_images

# (config, features [views,tokens,H] of each image, image sizes, newline) -> features [tokens,H]
Pack = Callable[[Any, list[torch.Tensor], torch.Tensor, torch.Tensor], list[torch.Tensor]]

NAME_ALIASES = (*llava.NAME_ALIASES, (r"^model\.image_newline$", "image_newline"))
IMAGE_PROCESSORS = ("LlavaNextImageProcessor",)
PROMPTS = {  # model_type of the decoder -> prompt
    "llama": "A chat between a curious human and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the human's questions. "
    "USER: {image}{question} ASSISTANT:",
    "mistral": "[INST] {image}{question} [/INST]",
}

full_config = full_config_reader("LlavaNextConfig")
text_config = text_config_reader(full_config)


class LlavaNextVision(llava.LlavaVision):
    """Vision tower and projector of LLaVA-1.5, applied to the resized image and to its tiles.

    A learned newline feature ends each row of the tiles' features.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config = config
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, concatenated.

        pixel_values [images,views,3,h,w] are padded to the most views of an image.
        """
        assert images.image_sizes is not None
        counts = view_counts(self.config, images.image_sizes)
        features = [
            self.encode_views(views[:count])
            for views, count in zip(images.pixel_values, counts, strict=True)
        ]
        packed = pack_features(self.config, features, images.image_sizes, self.image_newline)
        return torch.cat(packed)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        return super().published_parameters() | {"image_newline": self.image_newline}


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    llava.check_clip_vision(FAMILY.name, full)
    model_type = full.text_config.model_type
    if model_type not in PROMPTS:
        raise UserError(
            f"{FAMILY.name}: text_config.model_type is {model_type!r}; "
            f"supported: {', '.join(PROMPTS)}"
        )
    check_token_id(FAMILY.name, "image_token_index", full.image_token_index)
    return llama_decoder(FAMILY.name, full.text_config)


def make_vision_module(config: Config) -> LlavaNextVision:
    """Return the vision module, uninitialized."""
    return LlavaNextVision(full_config(config))


def view_counts(full: Any, image_sizes: torch.Tensor) -> list[int]:
    """Return the number of views of each image: the resized image and its tiles."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = full.vision_config.image_size
    return [
        image_size_to_num_patches(size.tolist(), full.image_grid_pinpoints, side)
        for size in image_sizes
    ]


def pack_features(
    full: Any, features: list[torch.Tensor], image_sizes: torch.Tensor, newline: torch.Tensor
) -> list[torch.Tensor]:
    """Arrange the features [views,tokens,H] of each image as the decoder expects them, [tokens,H].

    transformers' method reads nothing of its model but the config.
    """
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    model: Any = SimpleNamespace(config=full)
    packed, _ = LlavaNextModel.pack_image_features(model, features, image_sizes, "default", newline)
    return packed


def token_counts(full: Any, image_sizes: Any, pack: Pack = pack_features) -> list[int]:
    """Return the number of tokens of each image, from features on the meta device."""
    grid = full.vision_config.image_size // full.vision_config.patch_size
    features = [
        torch.empty(count, grid * grid, 1, device="meta")
        for count in view_counts(full, image_sizes)
    ]
    newline = torch.empty(1, device="meta")
    return [len(tokens) for tokens in pack(full, features, image_sizes, newline)]


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not that of the next images.
    """
    return find_views(full_config(config), ids, images, pack_features)


def find_views(full: Any, ids: Any, images: ImageInputs | None, pack: Pack) -> ImagePlaceholders:
    """Locate the image tokens of a model whose images are arranged by `pack`."""
    is_image = ids == full.image_token_index
    image_sizes = None if images is None else images.image_sizes
    if images is not None and image_sizes is None:
        raise UserError("inputs must hold image_sizes [images,2], height and width")
    counts = [] if image_sizes is None else token_counts(full, image_sizes, pack)
    found = remaining = int(is_image.sum())
    num_images = 0
    while remaining > 0 and num_images < len(counts):
        remaining -= counts[num_images]
        num_images += 1
    if remaining:
        raise UserError(f"got {found} image tokens; the remaining images take {counts}")
    return ImagePlaceholders(is_image=is_image, tokens_per_placeholder=1, num_images=num_images)


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of the decoder by default."""
    tokenizer, full = load_tokenizer(folder), full_config(config)
    processor = load_views_processor(folder, IMAGE_PROCESSORS, full)
    default = PROMPTS[full.text_config.model_type]
    render = prompt_renderer(folder, tokenizer, default, "<image>")
    return preprocess_views(tokenizer, processor, render, full, pack_features)


def load_views_processor(folder: Path, supported: tuple[str, ...], full: Any) -> Any:
    """Return the image processor of a folder, which must have the grids of config.json."""
    processor = load_image_processor(folder, supported, full.vision_config.image_size)
    if processor.image_grid_pinpoints != full.image_grid_pinpoints:
        raise UserError(
            f"{folder}: image_grid_pinpoints of the image processor are not those of config.json: "
            f"{processor.image_grid_pinpoints} and {full.image_grid_pinpoints}"
        )
    return processor


def preprocess_views(
    tokenizer: Any, processor: Any, render: Render, full: Any, pack: Pack
) -> Preprocess:
    """Return the function that builds samples of images that are arranged by `pack`."""

    def process(image: Any) -> ImageInputs:
        processed = processor(image, return_tensors="pt")
        return ImageInputs(processed["pixel_values"], processed["image_sizes"])

    def preprocess(
        sample_id: str, question: str, images: Any = None, answer: str = "", **_: Any
    ) -> Sample:
        parts = process_images(images, process)
        joined = join_images(parts)
        ids = tokenize_prompt(tokenizer, render(question, len(parts), answer))
        counts = [] if joined is None else token_counts(full, joined.image_sizes, pack)
        input_ids, is_image = expand_placeholders(sample_id, ids, full.image_token_index, counts)
        return Sample(sample_id, input_ids, is_image, joined)

    return preprocess


FAMILY = ModelFamily(
    name="llava_next",
    architectures=("LlavaNextForConditionalGeneration",),
    body_prefix=llava.BODY_PREFIX,
    head_prefix=llava.HEAD_PREFIX,
    trtllm_architecture="LlamaForCausalLM",
    parameter_map=partial(llama_parameter_map, body=llava.BODY_PREFIX, head=llava.HEAD_PREFIX),
    name_aliases=NAME_ALIASES,
    ignored_tensors=llava.IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="llava_next",
    other_repositories=(("LlavaMistralForCausalLM", llava.HF_REPOSITORY),),
)

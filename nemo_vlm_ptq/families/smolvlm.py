"""SmolVLM, SmolVLM2 and Idefics3: a SigLIP tower over tiles, and a Llama decoder.

An image is resized and cut into rows and columns of tiles, which the prompt names one by one; the
image in the size of one tile is the last. Parameters have the names of the published checkpoints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import (
    Config,
    Decoder,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
)
from nemo_vlm_ptq.families.chat_template import prompt_renderer, tokenize_prompt
from nemo_vlm_ptq.families.config_checks import (
    check_token_id,
    check_tower_sizes,
    require_positive,
    require_values,
)
from nemo_vlm_ptq.families.folder_files import load_tokenizer, token_of_id
from nemo_vlm_ptq.families.full_config import full_config_reader, text_config_reader
from nemo_vlm_ptq.families.image_processor import load_image_processor
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, llama_parameter_map
from nemo_vlm_ptq.families.placeholders import check_placeholder_count
from nemo_vlm_ptq.families.scaled_rope import scaled_rope_decoder
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.tied_head import make_config_completer
from nemo_vlm_ptq.families.tiles import tiles_of_tokens

BODY_PREFIX, HEAD_PREFIX, VISION_PREFIX = "model.text_model.", "lm_head.", "model."
IMAGE_PROCESSORS = ("SmolVLMImageProcessor", "Idefics3ImageProcessor")
ROPE_TYPES = ("default", "llama3")
MARKS = {  # attributes of the tokenizer: the token if it has none
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}
TILES_PER_CALL = 16

full_config = full_config_reader("SmolVLMConfig", "Idefics3Config")
text_config = text_config_reader(full_config)


class SmolVLMVision(nn.Module):
    """Vision tower and connector, applied to each tile; those of SmolVLM are Idefics3's."""

    def __init__(self, full: Any) -> None:
        from transformers.models.idefics3.modeling_idefics3 import (
            Idefics3Connector,
            Idefics3VisionTransformer,
        )

        super().__init__()
        self.side, self.patch = full.vision_config.image_size, full.vision_config.patch_size
        self.shape = (tokens_per_tile(full), full.text_config.hidden_size)
        self.vision_model = Idefics3VisionTransformer(full.vision_config)
        self.connector = Idefics3Connector(full)

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all tiles, concatenated.

        Raises:
            ValueError: tiles have another size than the tower's.
        """
        pixels, mask = images.pixel_values, images.pixel_mask
        if tuple(pixels.shape[-2:]) != (self.side, self.side):
            raise ValueError(f"tiles must have {self.side}*{self.side} pixels")
        if pixels.is_meta:  # the tower looks up values of the mask
            return pixels.new_empty(len(pixels) * self.shape[0], self.shape[1])
        if mask is None:
            mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.bool)
        patches = mask.to(pixels.device).bool().unfold(1, self.patch, self.patch)
        patches = patches.unfold(2, self.patch, self.patch).any(dim=-1).any(dim=-1)
        parts = zip(pixels.split(TILES_PER_CALL), patches.split(TILES_PER_CALL), strict=True)
        features = [
            self.connector(self.vision_model(tiles, patch_attention_mask=kept).last_hidden_state)
            for tiles, kept in parts
        ]
        return torch.cat(features).flatten(0, 1)

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        return {VISION_PREFIX + name: tensor for name, tensor in self.named_parameters()}


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    full = full_config(config)
    vision = full.vision_config
    require_values(FAMILY.name, {"text_config.model_type": (full.text_config.model_type, "llama")})
    check_token_id(FAMILY.name, "image_token_id", full.image_token_id)
    check_tower_sizes(FAMILY.name, vision)
    require_positive(FAMILY.name, {"scale_factor": full.scale_factor}, int)
    require_values(
        FAMILY.name,
        {
            "vision_config.num_channels": (vision.num_channels, 3),
            "rest of vision_config.hidden_size by num_attention_heads": (
                vision.hidden_size % vision.num_attention_heads,
                0,
            ),
        },
    )
    grid = vision.image_size // vision.patch_size
    if not grid or grid % full.scale_factor:
        raise UserError(
            f"{FAMILY.name}: scale_factor must divide the {grid} patches of "
            f"vision_config.image_size {vision.image_size}, got {full.scale_factor}"
        )
    return scaled_rope_decoder(FAMILY.name, config, full.text_config, ROPE_TYPES)


def make_vision_module(config: Config) -> SmolVLMVision:
    """Return the vision module, uninitialized."""
    return SmolVLMVision(full_config(config))


def tokens_per_tile(full: Any) -> int:
    """Return the number of image tokens of one tile."""
    vision = full.vision_config
    return int(vision.image_size // vision.patch_size // full.scale_factor) ** 2


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image tokens, which the published processor has expanded already.

    Raises:
        UserError: their number is not a multiple of the tokens of one tile.
    """
    full = full_config(config)
    return tiles_of_tokens(ids == full.image_token_id, tokens_per_tile(full))


def image_text(rows: int, columns: int, tile: str, mark: str, whole: str) -> str:
    """Return the text of an image in place of its placeholder.

    Args:
        rows: rows of tiles; one row of one column is an image that is not cut.
        columns: columns of tiles.
        tile: the image tokens of a tile.
        mark: the token in front of each tile, and behind the last.
        whole: the token in front of the whole image.
    """
    text = ""
    if rows * columns > 1:
        for row in range(1, rows + 1):
            names = [f"<row_{row}_col_{column}>" for column in range(1, columns + 1)]
            text += "".join(mark + name + tile for name in names) + "\n"
        text += "\n"
    return f"{text}{mark}{whole}{tile}{mark}"


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples, in the prompt of the folder's chat template.

    image_sizes [tiles,2] of its images is the size of the image that each tile is cut from.
    """
    tokenizer, full = load_tokenizer(folder), full_config(config)
    side, count = full.vision_config.image_size, tokens_per_tile(full)
    processor = load_image_processor(folder, IMAGE_PROCESSORS, side)
    token = token_of_id(folder, tokenizer, "image_token_id", full.image_token_id)
    render = prompt_renderer(folder, tokenizer, None, token)
    mark, whole = (getattr(tokenizer, name, default) for name, default in MARKS.items())

    def process(image: Any) -> ImageInputs:
        processed = processor(image, return_row_col_info=True, return_tensors="pt")
        tiles = processed["pixel_values"][0]
        cut = [max(int(processed[key][0][0]), 1) for key in ("rows", "cols")]
        size = side * torch.tensor([cut], dtype=torch.int64)
        return ImageInputs(tiles, image_sizes=size.expand(len(tiles), 2))

    def expand(image: ImageInputs, following: str) -> str:
        assert image.image_sizes is not None
        rows, columns = (image.image_sizes[0] // side).tolist()
        return image_text(rows, columns, token * count, mark, whole) + following

    def preprocess(
        sample_id: str, question: str, images: Any = None, answer: str = "", **_: Any
    ) -> Sample:
        parts = process_images(images, process)
        text = render(question, len(parts), answer)
        check_placeholder_count(sample_id, text.count(token), len(parts))
        first, *rest = text.split(token)
        text = first + "".join(map(expand, parts, rest))
        input_ids = torch.tensor(tokenize_prompt(tokenizer, text), dtype=torch.int64)
        is_image = input_ids == full.image_token_id
        return Sample(sample_id, input_ids, is_image, join_images(parts))

    return preprocess


FAMILY = ModelFamily(
    name="smolvlm",
    architectures=("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=(),
    ignored_tensors=(ROTARY_INV_FREQ,),
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="",
    most_tokens_per_image=17 * 169 + 60,  # of Idefics3: 16 tiles, the whole image, and their names
    is_tiled=True,
    pads_tiles=True,
    complete_config=make_config_completer(HEAD_PREFIX, (), default=False),
)

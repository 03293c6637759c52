"""VILA-1.5: a SigLIP vision tower, a projector that merges 2x2 patches, a Llama decoder.

A model has three sub-folders, llm/, vision_tower/ and mm_projector/, each with a config.json. The
config.json of the model folder repeats them, with paths of the training machine; where they
differ, the sub-folders' take precedence.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import (
    Config,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
)
from nemo_vlm_ptq.families.config_checks import (
    check_feature_layer,
    check_tower_sizes,
    require_values,
)
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.families.image_processor import load_image_processor
from nemo_vlm_ptq.families.llama import ROTARY_INV_FREQ, llama_decoder, llama_parameter_map
from nemo_vlm_ptq.families.placeholders import check_placeholder_count, expand_placeholders
from nemo_vlm_ptq.families.several_images import join_images, process_images
from nemo_vlm_ptq.families.towers import merge_patches, select_hidden_states, tower_parameters
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor

SUBFOLDERS = ("llm", "vision_tower", "mm_projector")
BODY_PREFIX, HEAD_PREFIX = "llm/model.", "llm/lm_head."
IMAGE_TOKEN_INDEX = -200  # published: one for each image; in a Sample: one for each image token
TOKEN_ORDERS = ("column", "row")  # of mm_token_order
DEFAULT_TOKEN_ORDER = "column"  # that of VILA-1.5's training; NVILA has "row"
IGNORED_TENSORS = (
    ROTARY_INV_FREQ,
    IgnoredTensor(pattern=r".*\.embeddings\.position_ids", reason="the integers from 0"),
    IgnoredTensor(
        pattern=r"vision_tower/vision_model\.head\..*",
        reason="features are those of patches, before the pooling head",
        passthrough=True,
    ),
)
VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
# Conversations vicuna_v1 and llama_3 of the vila1.5 branch. Its llama_3 names the second role
# "system"; here it is "assistant".
VICUNA_PROMPT = f"{VICUNA_SYSTEM_PROMPT} USER: {{image}}{{question}} ASSISTANT:"
LLAMA_3_PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"{LLAMA_3_SYSTEM_PROMPT}<|end_of_text|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{image}{question}<|end_of_text|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


class VilaVision(nn.Module):
    """SigLIP vision tower and projector of VILA-1.5.

    Args:
        tower: config.json of the vision tower.
        hidden: hidden size H of the decoder.
        feature_layer: index of the hidden state that the features are read from.
        token_order: "column" or "row", the order of image tokens over the grid of blocks.
    """

    def __init__(
        self, tower: dict[str, Any], hidden: int, feature_layer: int, token_order: str
    ) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        config = SiglipVisionConfig(**tower | {"vision_use_head": False})
        self.feature_layer, self.token_order = feature_layer, token_order
        self.vision_tower = SiglipVisionModel(config)
        width = 4 * config.hidden_size
        self.mm_projector = nn.ModuleDict(
            {
                "1": nn.LayerNorm(width),
                "2": nn.Linear(width, hidden),
                "4": nn.Linear(hidden, hidden),
            }
        )

    @torch.no_grad()
    def forward(self, images: ImageInputs) -> torch.Tensor:
        """Return the features [image tokens,H] of all images, concatenated."""
        return self.encode_views(images.pixel_values).flatten(0, 1)

    def encode_views(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features [n,tokens,H] of images [n,3,h,w]."""
        patches = select_hidden_states(self.vision_tower, pixel_values, self.feature_layer)
        norm, first, second = self.mm_projector.values()
        return second(functional.gelu(first(norm(downsample(patches, self.token_order)))))

    def published_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters by published name."""
        projector = {
            f"mm_projector/layers.{name}": tensor
            for name, tensor in self.mm_projector.named_parameters()
        }
        return tower_parameters("vision_tower/", self.vision_tower) | projector


def downsample(patches: torch.Tensor, token_order: str) -> torch.Tensor:
    """Merge 2x2 patches: [n,g*g,C] -> [n,m*m,4C], m = ceil(g/2).

    An odd grid is padded with a row and a column of zeros.
    """
    side = round(patches.shape[1] ** 0.5)
    grid = patches.reshape(len(patches), side, side, -1)
    if side % 2:
        grid = functional.pad(grid, (0, 0, 0, 1, 0, 1))
    blocks = merge_patches(grid)
    if token_order == "column":
        blocks = blocks.transpose(1, 2)
    return blocks.flatten(1, 2)


def complete_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the configs of the sub-folders as llm_cfg, vision_tower_cfg, ...

    Raises:
        UserError: a sub-folder has no config.json, and the config of the folder does not hold it.
    """
    merged = dict(config)
    for part in SUBFOLDERS:
        path = folder / part / "config.json"
        if path.is_file():
            merged[f"{part}_cfg"] = read_json_object(path)
        elif not isinstance(merged.get(f"{part}_cfg"), dict):
            raise UserError(f"{folder} has no {part}/config.json")
    return merged


def text_config(config: Config) -> Any:
    """Return transformers' LlamaConfig of the decoder."""
    from transformers import LlamaConfig

    return LlamaConfig.from_dict(dict(config["llm_cfg"]))


def decoder(config: Config) -> Decoder:
    """Return the architecture of the decoder.

    Raises:
        UserError: the config has a value that the family does not support.
    """
    from transformers import SiglipVisionConfig

    tower, projector = config["vision_tower_cfg"], config["mm_projector_cfg"]
    token_order = config.get("mm_token_order", DEFAULT_TOKEN_ORDER)
    if token_order not in TOKEN_ORDERS:
        raise UserError(
            f"vila: mm_token_order is {token_order!r}; supported: {', '.join(TOKEN_ORDERS)}"
        )
    require_values(
        "vila",
        {
            "llm_cfg.model_type": (config["llm_cfg"].get("model_type"), "llama"),
            "vision_tower_cfg.model_type": (tower.get("model_type"), "siglip_vision_model"),
            "mm_projector_type": (projector.get("mm_projector_type"), "mlp_downsample"),
            "mm_vision_select_feature": (
                config.get("mm_vision_select_feature", "cls_patch"),
                "cls_patch",
            ),
            "image_aspect_ratio": (config.get("image_aspect_ratio", "resize"), "resize"),
            "s2": (bool(config.get("s2")), False),
            "mm_use_im_start_end": (bool(config.get("mm_use_im_start_end")), False),
            "mm_use_im_patch_token": (bool(config.get("mm_use_im_patch_token")), False),
        },
    )
    full_tower: Any = SiglipVisionConfig(**tower)
    check_tower_sizes("vila", full_tower)
    depth = full_tower.num_hidden_layers
    check_feature_layer("vila", feature_layer(config), depth, "mm_vision_select_layer")
    return llama_decoder("vila", text_config(config), "llm_cfg")


def feature_layer(config: Config) -> int:
    """Return the index of the hidden state that the features are read from."""
    return int(config.get("mm_vision_select_layer", -2))


def make_vision_module(config: Config) -> VilaVision:
    """Return the vision module, uninitialized."""
    return VilaVision(
        tower=config["vision_tower_cfg"],
        hidden=text_config(config).hidden_size,
        feature_layer=feature_layer(config),
        token_order=config.get("mm_token_order", DEFAULT_TOKEN_ORDER),
    )


def tokens_per_image(config: Config) -> int:
    """Return the number of image tokens of one image."""
    from transformers import SiglipVisionConfig

    tower: Any = SiglipVisionConfig(**config["vision_tower_cfg"])
    grid = int(tower.image_size) // int(tower.patch_size)
    return (-(-grid // 2)) ** 2


def find_placeholders(config: Config, ids: Any, images: ImageInputs | None) -> ImagePlaceholders:
    """Locate the image placeholders; published ids have one for each image."""
    is_image = ids == IMAGE_TOKEN_INDEX
    return ImagePlaceholders(
        is_image=is_image,
        tokens_per_placeholder=tokens_per_image(config),
        num_images=int(is_image.sum()),
    )


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """Return the function that builds samples in the prompt format of the decoder.

    The text before and the text after the image are tokenized separately, as in VILA.
    """
    tokenizer = load_tokenizer(folder / "llm")
    side = int(config["vision_tower_cfg"].get("image_size", 224))  # transformers' default
    processor = load_image_processor(folder / "vision_tower", ("SiglipImageProcessor",), side)
    header_id = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    is_llama_3 = header_id not in (None, tokenizer.unk_token_id)
    template = LLAMA_3_PROMPT if is_llama_3 else VICUNA_PROMPT
    before, _, after = template.partition("{image}")
    count, bos = tokens_per_image(config), tokenizer.bos_token_id
    adds_bos = not is_llama_3 or tokenizer("")["input_ids"][:1] == [bos]
    first = [bos] if adds_bos else []

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def process(image: Any) -> ImageInputs:
        return ImageInputs(processor(image, return_tensors="pt")["pixel_values"])

    def preprocess(
        sample_id: str, question: str, images: Any = None, answer: str = "", **_: Any
    ) -> Sample:
        parts = process_images(images, process)
        text = after.format(question=question)
        if answer:
            text += answer if is_llama_3 else f" {answer}"
        check_placeholder_count(sample_id, len(parts) + text.count("<image>"), len(parts))
        ids = tokenize(before) if parts else tokenize(before + text)
        for index in range(len(parts)):
            following = text if index == len(parts) - 1 else ""
            ids += [IMAGE_TOKEN_INDEX, *tokenize("\n" + following)]
        input_ids, is_image = expand_placeholders(
            sample_id, [*first, *ids], IMAGE_TOKEN_INDEX, [count] * len(parts)
        )
        return Sample(sample_id, input_ids, is_image, join_images(parts))

    return preprocess


FAMILY = ModelFamily(
    name="vila",
    architectures=("LlavaLlamaModel",),
    body_prefix=BODY_PREFIX,
    head_prefix=HEAD_PREFIX,
    trtllm_architecture="LlamaForCausalLM",
    parameter_map=partial(llama_parameter_map, body=BODY_PREFIX, head=HEAD_PREFIX),
    name_aliases=(),
    ignored_tensors=IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="vila",
    tokens_per_image=tokens_per_image,
    subfolders=SUBFOLDERS,
    complete_config=complete_config,
)

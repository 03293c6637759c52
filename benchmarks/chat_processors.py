"""Write tokenizer, chat template and image settings of random models with a chat template."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nemo_vlm_ptq.workdir.store import write_json

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
QWEN_PIXELS = {"shortest_edge": 1 << 16, "longest_edge": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class ChatProcessor:
    """What a family's processor files say.

    tokens: key of config.json -> token, which is added to the tokenizer.
    image: text of an image in a prompt.
    settings: vision_config -> preprocessor_config.json.
    """

    tokens: Mapping[str, str]
    image: str
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]


def _qwen_settings(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": QWEN_PIXELS,
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    }


def _gemma_settings(vision: Mapping[str, Any]) -> dict[str, Any]:
    side = vision["image_size"]
    return {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": side, "width": side},
    }


QWEN = ChatProcessor(
    tokens={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    image="<|vision_start|><|image_pad|><|vision_end|>",
    settings=_qwen_settings,
)
GEMMA = ChatProcessor(
    tokens={
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    image="<start_of_image>",
    settings=_gemma_settings,
)
CHAT_PROCESSORS = {"gemma3": GEMMA, "qwen2_vl": QWEN, "qwen3_vl": QWEN, "qwen3_5": QWEN}


def write_chat_processor(
    family: str, source: Path, folder: Path, config: Mapping[str, Any]
) -> dict[str, int]:
    """Write the files of a model folder.

    Args:
        family: a key of CHAT_PROCESSORS.
        source: folder with tokenizer.json and tokenizer_config.json.
        folder: the model folder.
        config: its config.json.

    Returns:
        The ids of the tokens, by key of config.json.
    """
    processor = CHAT_PROCESSORS[family]
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([*processor.tokens.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(source / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", processor.image))
    settings = processor.settings(config["vision_config"])
    write_json(folder / "preprocessor_config.json", settings)
    return {key: tokenizer.token_to_id(token) for key, token in processor.tokens.items()}

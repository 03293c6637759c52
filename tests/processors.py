"""Reference models with the tokenizer and image processor files that preprocessing needs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import reference_gemma3
import reference_gemma4
import reference_internvl
import reference_llava_next
import reference_llava_onevision
import reference_mistral3
import reference_phi
import reference_qwen
import reference_smolvlm
import reference_vila
from tiny_tokenizers import write_llama

PHI_SPECIAL_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>")
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[INST]{% for part in message.content %}"
    "{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}{% endfor %}[/INST]"
    "{% endfor %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{{ '\n' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant:{{ '\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{{ '\n' }}{% endif %}"
)
GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "{{ '\n\n<|image|>\n\n' }}{% else %}{{ part.text | trim }}{% endif %}{% endfor %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<model>{{ '\n' }}{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{{ '\n' }}{% endif %}"
)
SMOLVLM_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
FIRST_SPECIAL_ID = 490  # above the special tokens in the references' vocabulary


def _write(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_vila_processor(folder: Path) -> None:
    """Write the image processor settings of a VILA folder."""
    side = reference_vila.SIDE
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": side, "width": side},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    _write(folder / "vision_tower", settings)


def write_phi_processor(folder: Path, crops: int) -> None:
    """Write the image processor settings of a Phi folder."""
    _write(folder, {"num_crops": crops, "image_mean": CLIP_MEAN, "image_std": CLIP_STD})


def write_llava_next_processor(folder: Path) -> None:
    """Write the image processor settings of a LLaVA-NeXT folder."""
    side = reference_llava_next.SIDE
    settings = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_grid_pinpoints": reference_llava_next.GRIDS,
    }
    _write(folder, settings)


def write_internvl_processor(folder: Path) -> None:
    """Write settings, tokenizer and chat template of an InternVL folder."""
    side = reference_internvl.SIDE
    settings = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "size": {"height": side, "width": side},
        "max_patches": reference_internvl.MOST_TILES,
        "crop_to_patches": False,
    }
    _write(folder, settings)
    write_llama(folder, ("</img>", "<img>", "<IMG_CONTEXT>"), size=reference_internvl.END)
    (folder / "chat_template.jinja").write_text(INTERNVL_TEMPLATE)


def write_llava_onevision_processor(folder: Path) -> None:
    """Write settings, tokenizer and chat template of a LLaVA-OneVision folder."""
    side = reference_llava_next.SIDE
    settings = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": side, "width": side},
        "image_grid_pinpoints": reference_llava_onevision.PINPOINTS,
    }
    _write(folder, settings)
    write_llama(folder, ["<image>"], size=reference_llava_next.IMAGE_TOKEN)
    (folder / "chat_template.jinja").write_text(ONEVISION_TEMPLATE)


def write_vila(folder: Path) -> None:
    """Write a random VILA folder with all its files."""
    reference_vila.write_vila(folder, 0)
    write_vila_processor(folder)
    write_llama(folder / "llm", size=FIRST_SPECIAL_ID)


def write_phi(folder: Path) -> None:
    """Write a random Phi folder with all its files."""
    reference_phi.write_phi(folder, 0)
    write_phi_processor(folder, 4)
    write_llama(folder, PHI_SPECIAL_TOKENS, size=FIRST_SPECIAL_ID)


def write_llava_next(folder: Path) -> None:
    """Write a random LLaVA-NeXT folder with all its files."""
    reference_llava_next.write_llava_next(folder, 0)
    write_llava_next_processor(folder)
    write_llama(folder, ["<image>"], size=reference_llava_next.IMAGE_TOKEN)


def write_qwen(folder: Path, kind: str) -> None:
    """Write a random Qwen-VL folder with all its files."""
    reference_qwen.write_qwen(folder, 0, kind)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": reference_qwen.SIZE,
        "patch_size": reference_qwen.PATCH,
        "merge_size": reference_qwen.MERGE,
        "temporal_patch_size": 2,
    }
    _write(folder, settings)
    special = ("<|vision_end|>", "<|vision_start|>", "<|video_pad|>", "<|image_pad|>")
    write_llama(folder, special, size=reference_qwen.VISION_END)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)


def write_mistral3(folder: Path, kind: str = "ministral3") -> None:
    """Write a random Mistral 3, Ministral 3 or Pixtral folder with all its files."""
    reference_mistral3.write_mistral3(folder, 0, kind)
    settings = {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": reference_mistral3.LONGEST_EDGE},
        "patch_size": {"height": 8, "width": 8},
    }
    _write(folder, settings)
    special = ("[IMG_END]", "[IMG_BREAK]", "[IMG]")
    write_llama(folder, special, size=reference_mistral3.IMAGE_END)
    (folder / "chat_template.jinja").write_text(MISTRAL_TEMPLATE)


def write_gemma3(folder: Path) -> None:
    """Write a random Gemma 3 folder with all its files."""
    reference_gemma3.write_gemma3(folder, 0)
    side = reference_gemma3.SIDE
    settings = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": side, "width": side},
        "do_pan_and_scan": None,
    }
    _write(folder, settings)
    special = ("<end_of_image>", "<start_of_image>", "<image_soft_token>")
    write_llama(folder, special, size=reference_gemma3.END)
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE)


def write_gemma4(folder: Path) -> None:
    """Write a random Gemma 4 folder with all its files."""
    reference_gemma4.write_gemma4(folder, 0)
    settings = {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": reference_gemma4.PATCH,
        "pooling_kernel_size": reference_gemma4.POOLING,
        "max_soft_tokens": reference_gemma4.MOST_TOKENS,
    }
    _write(folder, settings)
    special = ("<|audio|>", "<|video|>", "<image|>", "<|image>", "<|image|>")
    write_llama(folder, special, size=reference_gemma4.LEAST_SPECIAL)
    (folder / "chat_template.jinja").write_text(GEMMA4_TEMPLATE)


def write_llava_onevision(folder: Path) -> None:
    """Write a random LLaVA-OneVision folder with all its files."""
    reference_llava_onevision.write_llava_onevision(folder, 0)
    write_llava_onevision_processor(folder)


def write_internvl(folder: Path) -> None:
    """Write a random InternVL folder with all its files."""
    reference_internvl.write_internvl(folder, 0, "qwen2")
    write_internvl_processor(folder)


def write_smolvlm_processor(folder: Path, kind: str) -> None:
    """Write settings, tokenizer and chat template of a SmolVLM or Idefics3 folder."""
    settings = {
        "image_processor_type": reference_smolvlm.PROCESSORS[kind],
        "size": {"longest_edge": reference_smolvlm.LONGEST_EDGE},
        "max_image_size": {"longest_edge": reference_smolvlm.SIDE},
        "do_image_splitting": True,
    }
    _write(folder, settings)
    write_llama(folder, reference_smolvlm.TOKENS, size=reference_smolvlm.FIRST_TOKEN)
    (folder / "chat_template.jinja").write_text(SMOLVLM_TEMPLATE)


def write_smolvlm(folder: Path) -> None:
    """Write a random Idefics3 folder with all its files."""
    reference_smolvlm.write_smolvlm(folder, 0, "idefics3")
    write_smolvlm_processor(folder, "idefics3")


WRITERS = {
    "gemma3": write_gemma3,
    "gemma4": write_gemma4,
    "smolvlm": write_smolvlm,
    "mistral3": write_mistral3,
    "vila": write_vila,
    "phi": write_phi,
    "llava_next": write_llava_next,
    "llava_onevision": write_llava_onevision,
    "internvl": write_internvl,
    "qwen3_vl": partial(write_qwen, kind="qwen3_vl"),
    "qwen3_5": partial(write_qwen, kind="qwen3_5"),
    "qwen2_vl": partial(write_qwen, kind="qwen2_vl"),
}

"""LLaVA-NeXT (LLaVA-1.6): LLaVA-1.5's parts, and images cut into tiles of the tower's size.

The decoder is Vicuna's Llama or Mistral. Names are those of the published llava-v1.6-*-hf folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import llava
from nemo_vlm_ptq.families.base import (
    Config,
    Decoder,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
    expand_placeholders,
)
from nemo_vlm_ptq.families.shared import (
    llama_decoder,
    llama_parameter_map,
    load_tokenizer,
    require_image_processor,
)

NAME_ALIASES = (*llava.NAME_ALIASES, (r"^model\.image_newline$", "image_newline"))
PROMPTS = {
    "llama": "A chat between a curious human and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the human's questions. "
    "USER: {mark}{question} ASSISTANT:",
    "mistral": "[INST] {mark}{question} [/INST]",
}


def full_config(config: Config) -> Any:
    """transformers' LlavaNextConfig, with every default that the JSON leaves out."""
    from transformers import LlavaNextConfig

    return LlavaNextConfig.from_dict(dict(config))


def text_config(config: Config) -> Any:
    """transformers' config of the decoder."""
    return full_config(config).text_config


def decoder(config: Config) -> Decoder:
    """Facts of the decoder.

    Raises:
        UserError: the config asks for something this family's rows do not hold.
    """
    whole = full_config(config)
    llava.check_clip(FAMILY.name, whole)
    kind = whole.text_config.model_type
    if kind not in PROMPTS:
        raise UserError(
            f"{FAMILY.name}: text_config.model_type is {kind!r}; supported: {', '.join(PROMPTS)}"
        )
    return llama_decoder(FAMILY.name, whole.text_config)


def make_vision_module(config: Config) -> Any:
    """Tower, projector and newline, unfilled."""
    from nemo_vlm_ptq.families.llava_next_vision import LlavaNextVision

    return LlavaNextVision(full_config(config))


def token_counts(config: Config, sizes: Any) -> list[int]:
    """Tokens of each image of `sizes` [images,2], counted with features that take no memory."""
    import torch

    from nemo_vlm_ptq.families.llava_next_vision import pack, view_counts

    whole = full_config(config)
    grid = whole.vision_config.image_size // whole.vision_config.patch_size
    views = [
        torch.empty(count, grid * grid, 1, device="meta") for count in view_counts(whole, sizes)
    ]
    owner = type("Owner", (), {"config": whole})
    newline = torch.empty(1, device="meta")
    return [len(tokens) for tokens in pack(owner, views, sizes, newline)]


def find_placeholders(config: Config, ids: Any, pixels: ImageInputs | None) -> ImagePlaceholders:
    """Published ids have one id for each image token already.

    Raises:
        UserError: their number is not that of whole images.
    """
    is_image = ids == full_config(config).image_token_index
    wanted, images = int(is_image.sum()), 0
    if pixels is not None and pixels.image_sizes is None:
        raise UserError("inputs must hold image_sizes [images,2], height and width")
    counts = [] if pixels is None else token_counts(config, pixels.image_sizes)
    total = wanted
    while wanted > 0 and images < len(counts):
        wanted -= counts[images]
        images += 1
    if wanted:
        raise UserError(f"{total} image tokens; the images left take {counts}")
    return ImagePlaceholders(is_image, 1, images)


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """A function (id, question, image, answer) -> Sample in the prompt of the decoder."""
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokens = load_tokenizer(folder)
    require_image_processor(folder)
    images = LlavaNextImageProcessorPil.from_pretrained(folder)
    whole = full_config(config)
    prompt = PROMPTS[whole.text_config.model_type]

    def prepare(name: str, question: str, image: Any = None, answer: str = "") -> Sample:
        if image is not None and not isinstance(image, ImageInputs):
            made = images(image.convert("RGB"), return_tensors="pt")
            image = ImageInputs(made["pixel_values"], made["image_sizes"])
        mark = "<image>\n" if image is not None else ""
        text = prompt.format(mark=mark, question=question) + (f" {answer}" if answer else "")
        counts = [] if image is None else token_counts(config, image.image_sizes)
        ids = tokens(text)["input_ids"]
        input_ids, is_image = expand_placeholders(name, ids, whole.image_token_index, counts)
        return Sample(name, input_ids, is_image, image)

    return prepare


FAMILY = ModelFamily(
    name="llava_next",
    architectures=("LlavaNextForConditionalGeneration",),
    decoder_prefix=llava.DECODER_PREFIX,
    trtllm_architecture="LlamaForCausalLM",
    parameter_map=llama_parameter_map(llava.DECODER_PREFIX),
    name_aliases=NAME_ALIASES,
    ignored_tensors=llava.IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="llava_next",
)

"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama decoder.

Names are those of the published llava-hf checkpoints. `aliases` brings the other two vintages
(transformers 4.5x in memory, and transformers 5 without `vision_model.`) to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError
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
    COMPUTED_ROTARY,
    check_feature_layer,
    llama_decoder,
    llama_parameter_map,
    load_tokenizer,
    require_image_processor,
    require_values,
)
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor

DECODER_PREFIX = "language_model."

NAME_ALIASES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)

IGNORED_TENSORS = (
    COMPUTED_ROTARY,
    IgnoredTensor(r".*\.embeddings\.position_ids", "counts up from 0"),
)


def full_config(config: Config) -> Any:
    """transformers' LlavaConfig, with every default that the JSON leaves out."""
    from transformers import LlavaConfig

    return LlavaConfig.from_dict(dict(config))


def text_config(config: Config) -> Any:
    """transformers' LlamaConfig of the decoder."""
    return full_config(config).text_config


def decoder(config: Config) -> Decoder:
    """Facts of the decoder.

    Raises:
        UserError: the config asks for something this family's rows do not hold.
    """
    whole = full_config(config)
    check_clip(FAMILY.name, whole)
    require_values(FAMILY.name, {"text_config.model_type": (whole.text_config.model_type, "llama")})
    return llama_decoder(FAMILY.name, whole.text_config)


def check_clip(family: str, whole: Any) -> None:
    """Refuse what is not LLaVA's way of looking.

    Raises:
        UserError: another tower, another choice of its features, or tied embeddings.
    """
    require_values(
        family,
        {
            "tie_word_embeddings": (whole.tie_word_embeddings, False),
            "vision_config.model_type": (whole.vision_config.model_type, "clip_vision_model"),
            "vision_feature_select_strategy": (whole.vision_feature_select_strategy, "default"),
        },
    )
    depth = whole.vision_config.num_hidden_layers
    check_feature_layer(family, whole.vision_feature_layer, depth)


def make_vision_module(config: Config) -> Any:
    """Tower and projector, unfilled."""
    from nemo_vlm_ptq.families.llava_vision import LlavaVision

    return LlavaVision(full_config(config))


def image_tokens(config: Config) -> tuple[int, int]:
    """The id that stands for an image token, and how many of them one image takes."""
    whole = full_config(config)
    grid = whole.vision_config.image_size // whole.vision_config.patch_size
    return whole.image_token_index, grid * grid


def find_placeholders(config: Config, ids: Any, pixels: ImageInputs | None) -> ImagePlaceholders:
    """Published ids have one id for each image token already.

    Raises:
        UserError: their number is not one of whole images.
    """
    image_id, count = image_tokens(config)
    is_image = ids == image_id
    images, rest = divmod(int(is_image.sum()), count)
    if rest:
        raise UserError(f"{int(is_image.sum())} image tokens; each image takes {count}")
    return ImagePlaceholders(is_image, 1, images)


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """A function (id, question, image, answer) -> Sample in LLaVA-1.5's prompt."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokens = load_tokenizer(folder)
    require_image_processor(folder)
    images = CLIPImageProcessorPil.from_pretrained(folder)
    image_id, count = image_tokens(config)

    def prepare(name: str, question: str, image: Any = None, answer: str = "") -> Sample:
        mark = "<image>\n" if image is not None else ""
        text = f"USER: {mark}{question} ASSISTANT:" + (f" {answer}" if answer else "")
        counts = [] if image is None else [count]
        input_ids, is_image = expand_placeholders(name, tokens(text)["input_ids"], image_id, counts)
        if image is not None and not isinstance(image, ImageInputs):
            image = ImageInputs(images(image.convert("RGB"), return_tensors="pt")["pixel_values"])
        return Sample(name, input_ids, is_image, image)

    return prepare


FAMILY = ModelFamily(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    decoder_prefix=DECODER_PREFIX,
    trtllm_architecture="LlamaForCausalLM",
    parameter_map=llama_parameter_map(DECODER_PREFIX),
    name_aliases=NAME_ALIASES,
    ignored_tensors=IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="llava",
    tokens_per_image=lambda config: image_tokens(config)[1],
    nemo_supported=True,
)

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
    Marks,
    ModelFamily,
    Pixels,
    Prepare,
    Sample,
    place_images,
)
from nemo_vlm_ptq.families.shared import (
    COMPUTED,
    check_feature_layer,
    llama_facts,
    llama_rows,
    load_tokenizer,
    need,
    need_processor,
)
from nemo_vlm_ptq.mapping.rows import Drop

LM = "language_model."

ALIASES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)

DROPS = (
    COMPUTED,
    Drop(r".*\.embeddings\.position_ids", "counts up from 0"),
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
    need(FAMILY.name, {"text_config.model_type": (whole.text_config.model_type, "llama")})
    return llama_facts(FAMILY.name, whole.text_config)


def check_clip(family: str, whole: Any) -> None:
    """Refuse what is not LLaVA's way of looking.

    Raises:
        UserError: another tower, another choice of its features, or tied embeddings.
    """
    need(
        family,
        {
            "tie_word_embeddings": (whole.tie_word_embeddings, False),
            "vision_config.model_type": (whole.vision_config.model_type, "clip_vision_model"),
            "vision_feature_select_strategy": (whole.vision_feature_select_strategy, "default"),
        },
    )
    depth = whole.vision_config.num_hidden_layers
    check_feature_layer(family, whole.vision_feature_layer, depth)


def vision(config: Config) -> Any:
    """Tower and projector, unfilled."""
    from nemo_vlm_ptq.vision.llava import LlavaVision

    return LlavaVision(full_config(config))


def image_tokens(config: Config) -> tuple[int, int]:
    """The id that stands for an image token, and how many of them one image takes."""
    whole = full_config(config)
    grid = whole.vision_config.image_size // whole.vision_config.patch_size
    return whole.image_token_index, grid * grid


def expand(config: Config, ids: Any, pixels: Pixels | None) -> Marks:
    """Published ids have one id for each image token already.

    Raises:
        UserError: their number is not one of whole images.
    """
    image_id, count = image_tokens(config)
    is_image = ids == image_id
    images, rest = divmod(int(is_image.sum()), count)
    if rest:
        raise UserError(f"{int(is_image.sum())} image tokens; each image takes {count}")
    return Marks(is_image, 1, images)


def preparer(folder: Path, config: Config) -> Prepare:
    """A function (id, question, image, answer) -> Sample in LLaVA-1.5's prompt."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokens = load_tokenizer(folder)
    need_processor(folder)
    images = CLIPImageProcessorPil.from_pretrained(folder)
    image_id, count = image_tokens(config)

    def prepare(name: str, question: str, image: Any = None, answer: str = "") -> Sample:
        mark = "<image>\n" if image is not None else ""
        text = f"USER: {mark}{question} ASSISTANT:" + (f" {answer}" if answer else "")
        counts = [] if image is None else [count]
        input_ids, is_image = place_images(name, tokens(text)["input_ids"], image_id, counts)
        if image is not None and not isinstance(image, Pixels):
            image = Pixels(images(image.convert("RGB"), return_tensors="pt")["pixel_values"])
        return Sample(name, input_ids, is_image, image)

    return prepare


FAMILY = ModelFamily(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    decoder_prefix=LM,
    trtllm_architecture="LlamaForCausalLM",
    rows=llama_rows(LM),
    aliases=ALIASES,
    drops=DROPS,
    decoder=decoder,
    text_config=text_config,
    vision=vision,
    preparer=preparer,
    expand=expand,
    vision_engine="llava",
    image_tokens=lambda config: image_tokens(config)[1],
    nemo=True,
)

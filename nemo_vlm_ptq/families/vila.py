"""VILA-1.5: a SigLIP tower, a projector that merges 2x2 patches, a Llama decoder; three folders.

The folders are llm/, vision_tower/ and mm_projector/, each with a config.json of its own; where
config.json of the whole says otherwise (it names paths of the machine of its training), they count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import (
    Config,
    Decoder,
    ImageInputs,
    ImagePlaceholders,
    ModelFamily,
    Preprocess,
    Sample,
    check_placeholder_count,
    expand_placeholders,
)
from nemo_vlm_ptq.families.shared import (
    COMPUTED_ROTARY,
    check_feature_layer,
    llama_decoder,
    llama_parameter_map,
    load_tokenizer,
    require_file,
    require_values,
)
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor

SUBFOLDERS = ("llm", "vision_tower", "mm_projector")
DECODER_PREFIX = "llm/"
IMAGE_ID = -200  # stands for an image in published ids, and for each of its tokens in ours
TOKEN_ORDERS = ("column", "row")
IGNORED_TENSORS = (
    COMPUTED_ROTARY,
    IgnoredTensor(r".*\.embeddings\.position_ids", "counts up from 0"),
    IgnoredTensor(
        r"vision_tower/vision_model\.head\..*", "VILA looks at patches, not the pool", True
    ),
)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
# vicuna_v1 and llama_3 of the vila1.5 branch, but for its second role, which was "system"
VICUNA = f"{SYSTEM} USER: {{mark}}{{question}} ASSISTANT:"
LLAMA_3 = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM_3}<|end_of_text|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{mark}{question}<|end_of_text|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def complete_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the configs of the three folders as llm_cfg, vision_tower_cfg, ...

    Raises:
        UserError: a part has no config.
    """
    whole = dict(config)
    for part in SUBFOLDERS:
        path = folder / part / "config.json"
        if path.is_file():
            whole[f"{part}_cfg"] = read_json_object(path)
        elif not isinstance(whole.get(f"{part}_cfg"), dict):
            raise UserError(f"{folder} has no {part}/config.json")
    return whole


def text_config(config: Config) -> Any:
    """transformers' LlamaConfig of the decoder."""
    from transformers import LlamaConfig

    return LlamaConfig.from_dict(dict(config["llm_cfg"]))


def decoder(config: Config) -> Decoder:
    """Facts of the decoder.

    Raises:
        UserError: another decoder, tower, projector or way to look at an image than VILA-1.5's.
    """
    tower, projector = config["vision_tower_cfg"], config["mm_projector_cfg"]
    order = token_order(config)
    if order not in TOKEN_ORDERS:
        raise UserError(f"vila: mm_token_order is {order!r}; known: {', '.join(TOKEN_ORDERS)}")
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
    depth = tower.get("num_hidden_layers", 12)
    check_feature_layer("vila", feature_layer(config), depth, "mm_vision_select_layer")
    return llama_decoder("vila", text_config(config), "llm_cfg")


def token_order(config: Config) -> Any:
    """The way the blocks of an image are read: `column`, as VILA-1.5 was trained, unless told."""
    return config.get("mm_token_order", "column")


def feature_layer(config: Config) -> int:
    """Hidden state of the tower that is looked at."""
    return int(config.get("mm_vision_select_layer", -2))


def make_vision_module(config: Config) -> Any:
    """Tower and projector, unfilled."""
    from nemo_vlm_ptq.families.vila_vision import VilaVision

    hidden = text_config(config).hidden_size
    tower, layer = config["vision_tower_cfg"], feature_layer(config)
    return VilaVision(tower, hidden, layer, token_order(config))


def image_tokens(config: Config) -> int:
    """Tokens of one image."""
    from transformers import SiglipVisionConfig

    from nemo_vlm_ptq.families.vila_vision import token_count

    tower = SiglipVisionConfig(**config["vision_tower_cfg"])
    return token_count(int(tower.image_size), int(tower.patch_size))  # type: ignore[arg-type]


def find_placeholders(config: Config, ids: Any, pixels: ImageInputs | None) -> ImagePlaceholders:
    """Published ids have one -200 for each image."""
    is_image = ids == IMAGE_ID
    return ImagePlaceholders(is_image, image_tokens(config), int(is_image.sum()))


def make_preprocessor(folder: Path, config: Config) -> Preprocess:
    """A function (id, question, image, answer) -> Sample in the prompt of the decoder.

    Pieces of the prompt beside the image are tokenized apart, as VILA does.
    """
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokens = load_tokenizer(folder / "llm")
    require_file(folder / "vision_tower", "preprocessor_config.json")
    processor = SiglipImageProcessorPil.from_pretrained(folder / "vision_tower")
    llama_3 = tokens.convert_tokens_to_ids("<|start_header_id|>") not in (
        None,
        tokens.unk_token_id,
    )
    prompt, count = LLAMA_3 if llama_3 else VICUNA, image_tokens(config)
    begin = tokens.bos_token_id
    first = [begin] if not llama_3 or tokens("")["input_ids"][:1] == [begin] else []

    def piece(text: str) -> list[int]:
        return tokens(text, add_special_tokens=False)["input_ids"]

    def prepare(name: str, question: str, image: Any = None, answer: str = "") -> Sample:
        if image is not None and not isinstance(image, ImageInputs):
            made = processor(image.convert("RGB"), return_tensors="pt")
            image = ImageInputs(made["pixel_values"])
        before, between, after = prompt.partition("{mark}")
        assert between
        space = "" if llama_3 else " "
        after = after.format(question=question) + (f"{space}{answer}" if answer else "")
        images = int(image is not None)
        check_placeholder_count(name, images + after.count("<image>"), images)
        if image is None:
            ids = piece(before + after)
        else:
            ids = [*piece(before), IMAGE_ID, *piece("\n" + after)]
        input_ids, is_image = expand_placeholders(name, [*first, *ids], IMAGE_ID, [count] * images)
        return Sample(name, input_ids, is_image, image)

    return prepare


FAMILY = ModelFamily(
    name="vila",
    architectures=("LlavaLlamaModel",),
    decoder_prefix=DECODER_PREFIX,
    trtllm_architecture="LlamaForCausalLM",
    parameter_map=llama_parameter_map(DECODER_PREFIX),
    name_aliases=(),
    ignored_tensors=IGNORED_TENSORS,
    decoder=decoder,
    text_config=text_config,
    make_vision_module=make_vision_module,
    make_preprocessor=make_preprocessor,
    find_placeholders=find_placeholders,
    trtllm_vision_type="vila",
    tokens_per_image=image_tokens,
    subfolders=SUBFOLDERS,
    complete_config=complete_config,
)

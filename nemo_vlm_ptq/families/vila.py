"""VILA-1.5: a SigLIP tower, a projector that merges 2x2 patches, a Llama decoder; three folders.

The folders are llm/, vision_tower/ and mm_projector/, each with a config.json of its own; where
config.json of the whole says otherwise (it names paths of the machine of its training), they count.
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
    need_marks,
    place_images,
)
from nemo_vlm_ptq.families.shared import (
    COMPUTED,
    check_feature_layer,
    llama_facts,
    llama_rows,
    load_tokenizer,
    need,
    need_file,
)
from nemo_vlm_ptq.mapping.rows import Drop
from nemo_vlm_ptq.source import read_object

PARTS = ("llm", "vision_tower", "mm_projector")
LM = "llm/"
IMAGE_ID = -200  # stands for an image in published ids, and for each of its tokens in ours
ORDERS = ("column", "row")
DROPS = (
    COMPUTED,
    Drop(r".*\.embeddings\.position_ids", "counts up from 0"),
    Drop(r"vision_tower/vision_model\.head\..*", "VILA looks at patches, not the pool", True),
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


def complete(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the configs of the three folders as llm_cfg, vision_tower_cfg, ...

    Raises:
        UserError: a part has no config.
    """
    whole = dict(config)
    for part in PARTS:
        path = folder / part / "config.json"
        if path.is_file():
            whole[f"{part}_cfg"] = read_object(path)
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
    if order not in ORDERS:
        raise UserError(f"vila: mm_token_order is {order!r}; known: {', '.join(ORDERS)}")
    need(
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
    return llama_facts("vila", text_config(config), "llm_cfg")


def token_order(config: Config) -> Any:
    """The way the blocks of an image are read: `column`, as VILA-1.5 was trained, unless told."""
    return config.get("mm_token_order", "column")


def feature_layer(config: Config) -> int:
    """Hidden state of the tower that is looked at."""
    return int(config.get("mm_vision_select_layer", -2))


def vision(config: Config) -> Any:
    """Tower and projector, unfilled."""
    from nemo_vlm_ptq.vision.vila import VilaVision

    hidden = text_config(config).hidden_size
    tower, layer = config["vision_tower_cfg"], feature_layer(config)
    return VilaVision(tower, hidden, layer, token_order(config))


def image_tokens(config: Config) -> int:
    """Tokens of one image."""
    from transformers import SiglipVisionConfig

    from nemo_vlm_ptq.vision.vila import token_count

    tower = SiglipVisionConfig(**config["vision_tower_cfg"])
    return token_count(int(tower.image_size), int(tower.patch_size))  # type: ignore[arg-type]


def expand(config: Config, ids: Any, pixels: Pixels | None) -> Marks:
    """Published ids have one -200 for each image."""
    is_image = ids == IMAGE_ID
    return Marks(is_image, image_tokens(config), int(is_image.sum()))


def preparer(folder: Path, config: Config) -> Prepare:
    """A function (id, question, image, answer) -> Sample in the prompt of the decoder.

    Pieces of the prompt beside the image are tokenized apart, as VILA does.
    """
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokens = load_tokenizer(folder / "llm")
    need_file(folder / "vision_tower", "preprocessor_config.json")
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
        if image is not None and not isinstance(image, Pixels):
            made = processor(image.convert("RGB"), return_tensors="pt")
            image = Pixels(made["pixel_values"])
        before, between, after = prompt.partition("{mark}")
        assert between
        space = "" if llama_3 else " "
        after = after.format(question=question) + (f"{space}{answer}" if answer else "")
        images = int(image is not None)
        need_marks(name, images + after.count("<image>"), images)
        if image is None:
            ids = piece(before + after)
        else:
            ids = [*piece(before), IMAGE_ID, *piece("\n" + after)]
        input_ids, is_image = place_images(name, [*first, *ids], IMAGE_ID, [count] * images)
        return Sample(name, input_ids, is_image, image)

    return prepare


FAMILY = ModelFamily(
    name="vila",
    architectures=("LlavaLlamaModel",),
    decoder_prefix=LM,
    trtllm_architecture="LlamaForCausalLM",
    rows=llama_rows(LM),
    aliases=(),
    drops=DROPS,
    decoder=decoder,
    text_config=text_config,
    vision=vision,
    preparer=preparer,
    expand=expand,
    vision_engine="vila",
    image_tokens=image_tokens,
    parts=PARTS,
    complete=complete,
)

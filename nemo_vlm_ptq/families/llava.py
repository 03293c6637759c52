"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama decoder.

Names are those of the published llava-hf checkpoints. `aliases` brings the other two vintages
(transformers 4.5x in memory, and transformers 5 without `vision_model.`) to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Decoder, ModelFamily, Prepare, Sample
from nemo_vlm_ptq.mapping.rows import Drop, Row

LM = "language_model."
LAYER = LM + "model.layers.{i}."

ROWS = (
    Row("embedding.word_embeddings.weight", (LM + "model.embed_tokens.weight",), "vocab"),
    Row("decoder.final_layernorm.weight", (LM + "model.norm.weight",), "replicate"),
    Row("output_layer.weight", (LM + "lm_head.weight",), "vocab"),
    Row(
        "decoder.layers.{i}.input_layernorm.weight",
        (LAYER + "input_layernorm.weight",),
        "replicate",
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        tuple(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        "qkv",
        linear=True,
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        (LAYER + "self_attn.o_proj.weight",),
        "row",
        linear=True,
    ),
    Row(
        "decoder.layers.{i}.pre_mlp_layernorm.weight",
        (LAYER + "post_attention_layernorm.weight",),
        "replicate",
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        "gated",
        linear=True,
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc2.weight",
        (LAYER + "mlp.down_proj.weight",),
        "row",
        linear=True,
    ),
)

ALIASES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)

DROPS = (
    Drop(r".*\.rotary_emb\.inv_freq", "computed from rope_theta"),
    Drop(r".*\.embeddings\.position_ids", "counts up from 0"),
)


def full_config(config: Mapping[str, Any]) -> Any:
    """transformers' LlavaConfig, with every default that the JSON leaves out."""
    from transformers import LlavaConfig

    return LlavaConfig.from_dict(dict(config))


def text_config(config: Mapping[str, Any]) -> Any:
    """transformers' LlamaConfig of the decoder."""
    return full_config(config).text_config


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Facts of the decoder.

    Raises:
        UserError: the config asks for something this family's rows do not hold.
    """
    whole = full_config(config)
    text = whole.text_config
    rope = dict(text.to_dict().get("rope_parameters") or {})
    wanted = {
        "text_config.model_type": (text.model_type, "llama"),
        "tie_word_embeddings": (whole.tie_word_embeddings or text.tie_word_embeddings, False),
        "text_config.attention_bias": (text.attention_bias, False),
        "text_config.mlp_bias": (text.mlp_bias, False),
        "text_config.hidden_act": (text.hidden_act, "silu"),
        "rope type": (rope.get("rope_type", "default"), "default"),
        "vision_config.model_type": (whole.vision_config.model_type, "clip_vision_model"),
        "vision_feature_select_strategy": (whole.vision_feature_select_strategy, "default"),
    }
    for key, (value, need) in wanted.items():
        if value != need:
            raise UserError(f"llava: {key} is {value!r}; only {need!r} is supported")
    _check_sizes(whole)
    return Decoder(
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope_theta=rope.get("rope_theta", 10000.0),
        max_positions=text.max_position_embeddings,
    )


def _check_sizes(whole: Any) -> None:
    """Sizes that a decoder and a tower must have, whatever the checkpoint holds."""
    text, depth = whole.text_config, whole.vision_config.num_hidden_layers
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % kv_heads:
        raise UserError(f"llava: {heads} attention heads are no multiple of {kv_heads} KV heads")
    if text.hidden_size % heads and not getattr(text, "head_dim", None):
        raise UserError(f"llava: hidden_size {text.hidden_size} is no multiple of {heads} heads")
    chosen = whole.vision_feature_layer
    for layer in [chosen] if isinstance(chosen, int) else chosen:
        if not -depth - 1 <= layer <= depth:
            raise UserError(
                f"llava: vision_feature_layer {layer} is outside of a tower of {depth} layers"
            )


def vision_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of tower and projector."""
    import torch

    from nemo_vlm_ptq.vision.llava import LlavaVision

    with torch.device("meta"):
        module = LlavaVision(full_config(config))
    return {name: tuple(tensor.shape) for name, tensor in module.published().items()}


def build_vision(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """Tower and projector: pixels [images,3,h,w] -> features [images,tokens,hidden]."""
    from nemo_vlm_ptq.vision.llava import LlavaVision

    return LlavaVision(full_config(config)).load(tensors)


def image_tokens(config: Mapping[str, Any]) -> tuple[int, int]:
    """The id that stands for an image token, and how many of them one image takes."""
    whole = full_config(config)
    grid = whole.vision_config.image_size // whole.vision_config.patch_size
    return whole.image_token_index, grid * grid


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; never runs remote code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def preparer(folder: Path, config: Mapping[str, Any]) -> Prepare:
    """A function (id, question, image, answer) -> Sample in LLaVA-1.5's prompt.

    The image is a picture, the pixels of an earlier sample of it, or None.
    """
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    for names in (("tokenizer.json", "tokenizer.model"), ("preprocessor_config.json",)):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder} has no {' or '.join(names)}, which questions need")
    tokens, images = tokenizer(folder), CLIPImageProcessorPil.from_pretrained(folder)
    image_id, count = image_tokens(config)

    def prepare(name: str, question: str, image: Any = None, answer: str = "") -> Sample:
        mark = "<image>\n" if image is not None else ""
        text = f"USER: {mark}{question} ASSISTANT:" + (f" {answer}" if answer else "")
        ids: list[int] = []
        for token in tokens(text)["input_ids"]:
            ids += [token] * (count if token == image_id else 1)
        input_ids = torch.tensor(ids)
        pixels = image
        if image is not None and not isinstance(image, torch.Tensor):
            pixels = images(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return Sample(name, input_ids, input_ids == image_id, pixels)

    return prepare


FAMILY = ModelFamily(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    decoder_prefix=LM,
    trtllm_architecture="LlamaForCausalLM",
    rows=ROWS,
    aliases=ALIASES,
    drops=DROPS,
    decoder=decoder,
    text_config=text_config,
    vision_shapes=vision_shapes,
    build_vision=build_vision,
    preparer=preparer,
    image_tokens=image_tokens,
    tokenizer=tokenizer,
)

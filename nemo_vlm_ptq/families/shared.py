"""What families share: rows of Llama-like decoders, facts and refusals, files of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor, ParameterEntry

LAYER_PREFIX = "model.layers.{i}."
QKV = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
COMPUTED_ROTARY = IgnoredTensor(r".*\.rotary_emb\.inv_freq", "computed from rope_theta")


def llama_parameter_map(
    prefix: str, qkv: tuple[str, ...] = QKV, gated: tuple[str, ...] = GATE_UP
) -> tuple[ParameterEntry, ...]:
    """Rows of a Llama-like decoder.

    Args:
        prefix: what stands before `model.` and `lm_head.`.
        qkv: names in a layer of q, k and v, or of the one tensor that holds them.
        gated: names in a layer of gate and up, or of the one tensor that holds them.
    """
    layer, mine = prefix + LAYER_PREFIX, "decoder.layers.{i}."
    return (
        ParameterEntry(
            "embedding.word_embeddings.weight", (prefix + "model.embed_tokens.weight",), "vocab"
        ),
        ParameterEntry(
            "decoder.final_layernorm.weight", (prefix + "model.norm.weight",), "replicate"
        ),
        ParameterEntry("output_layer.weight", (prefix + "lm_head.weight",), "vocab"),
        ParameterEntry(
            mine + "input_layernorm.weight", (layer + "input_layernorm.weight",), "replicate"
        ),
        ParameterEntry(
            mine + "self_attention.linear_qkv.weight",
            tuple(layer + name for name in qkv),
            "qkv",
            is_linear=True,
        ),
        ParameterEntry(
            mine + "self_attention.linear_proj.weight",
            (layer + "self_attn.o_proj.weight",),
            "row",
            is_linear=True,
        ),
        ParameterEntry(
            mine + "pre_mlp_layernorm.weight",
            (layer + "post_attention_layernorm.weight",),
            "replicate",
        ),
        ParameterEntry(
            mine + "mlp.linear_fc1.weight",
            tuple(layer + name for name in gated),
            "gated",
            is_linear=True,
        ),
        ParameterEntry(
            mine + "mlp.linear_fc2.weight", (layer + "mlp.down_proj.weight",), "row", is_linear=True
        ),
    )


def require_values(family: str, wanted: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a config that asks for what a family does not hold; wanted: key -> (value, need).

    Raises:
        UserError: names the first value that is not the one supported.
    """
    for key, (value, needed) in wanted.items():
        if value != needed:
            raise UserError(f"{family}: {key} is {value!r}; only {needed!r} is supported")


def llama_decoder(family: str, text: Any, key: str = "text_config") -> Decoder:
    """Facts of a decoder from transformers' LlamaConfig, MistralConfig or the like.

    Raises:
        UserError: the config asks for something that the rows do not hold.
    """
    rope = dict(text.to_dict().get("rope_parameters") or {})
    require_values(
        family,
        {
            "tie_word_embeddings": (text.tie_word_embeddings, False),
            f"{key}.attention_bias": (getattr(text, "attention_bias", False), False),
            f"{key}.mlp_bias": (getattr(text, "mlp_bias", False), False),
            f"{key}.hidden_act": (text.hidden_act, "silu"),
            "rope type": (rope.get("rope_type", "default"), "default"),
        },
    )
    return decoder_from_sizes(family, text, rope.get("rope_theta", 10000.0))


def decoder_from_sizes(family: str, text: Any, rope_theta: float) -> Decoder:
    """Sizes of a decoder, checked to fit together.

    Raises:
        UserError: heads that do not divide what they share.
    """
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % kv_heads:
        raise UserError(f"{family}: {heads} attention heads are no multiple of {kv_heads} KV heads")
    own_dim = getattr(text, "head_dim", None)
    if text.hidden_size % heads and not own_dim:
        raise UserError(f"{family}: hidden_size {text.hidden_size} is no multiple of {heads} heads")
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings:
        raise UserError(
            f"{family}: sliding_window {window} is shorter than the {text.max_position_embeddings} "
            "positions; only attention over all of them is supported"
        )
    return Decoder(
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=own_dim or text.hidden_size // heads,
        vocab=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope_theta=rope_theta,
        max_positions=text.max_position_embeddings,
    )


def check_feature_layer(
    family: str, layers: int | list[int], depth: int, key: str = "vision_feature_layer"
) -> None:
    """Refuse a feature layer that the tower does not have.

    Raises:
        UserError: it lies outside of the hidden states of `depth` layers.
    """
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -depth - 1 <= layer <= depth:
            raise UserError(f"{family}: {key} {layer} is outside of a tower of {depth} layers")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; never runs remote code. Several threads may ask it at a time.

    Raises:
        UserError: the folder has none.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder} has no tokenizer.json or tokenizer.model, which questions need")
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens("")  # transformers sets things when it is first asked, which fails while others ask
    return tokens


def require_image_processor(folder: Path) -> None:
    """A model folder has settings of an image processor, in either of transformers' files.

    Raises:
        UserError: it has not.
    """
    path = folder / "processor_config.json"
    if not (path.is_file() and "image_processor" in read_json_object(path)):
        require_file(folder, "preprocessor_config.json")


def require_file(folder: Path, name: str) -> Path:
    """The path of a file of a model folder.

    Raises:
        UserError: it is not there.
    """
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}, which questions need")
    return folder / name

"""Parameter map and architecture of Llama-like decoders."""

from __future__ import annotations

from typing import Any

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.config_checks import require_positive, require_values
from nemo_vlm_ptq.families.decoder import LAYER_SCALAR, Decoder
from nemo_vlm_ptq.families.delta_net import delta_net_entries
from nemo_vlm_ptq.parameter_map.entries import IgnoredTensor, ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import Sharding

HF_LAYER_PREFIX = "layers.{i}."
MEGATRON_LAYER_PREFIX = "decoder.layers.{i}."
SPLIT_QKV = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
SPLIT_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
POST_NORMS = {  # Megatron -> Hugging Face, of decoders with post_norms
    "self_attn_bda.post_self_attn_layernorm": "post_attention_layernorm",
    "mlp_bda.post_mlp_layernorm": "post_feedforward_layernorm",
}
ROTARY_INV_FREQ = IgnoredTensor(
    pattern=r".*\.rotary_emb\.inv_freq", reason="computed from rope_theta"
)


def llama_parameter_map(
    decoder: Decoder,
    body: str,
    head: str,
    qkv: tuple[str, ...] = SPLIT_QKV,
    gate_up: tuple[str, ...] = SPLIT_GATE_UP,
) -> tuple[ParameterEntry, ...]:
    """Return the parameter map of a Llama-like decoder.

    Args:
        decoder: says which biases and norms there are, and whether the head is tied.
        body: prefix of the Hugging Face names, in place of `model.`.
        head: prefix in place of `lm_head.`.
        qkv: names within a layer of q, k and v, or of the one tensor that fuses them.
        gate_up: names within a layer of gate and up, or of the one tensor that fuses them.
    """
    layer, attention = body + HF_LAYER_PREFIX, MEGATRON_LAYER_PREFIX + "self_attention."
    embedding = body + "embed_tokens.weight"
    optional = delta_net_entries(decoder, layer, attention)
    for shape, layers in decoder.attention_kinds.items():
        optional += _attention_entries(decoder, layer, qkv[:2] if shape.v_from_k else qkv, layers)
    pre_mlp_norm = "post_attention_layernorm"
    if decoder.post_norms:
        pre_mlp_norm = "pre_feedforward_layernorm"
        optional += [
            ParameterEntry(
                megatron_name=MEGATRON_LAYER_PREFIX + f"{module}.weight",
                hf_names=(layer + f"{name}.weight",),
                sharding="replicate",
            )
            for module, name in POST_NORMS.items()
        ]
    if decoder.layer_scalar:
        optional.append(
            ParameterEntry(
                megatron_name=MEGATRON_LAYER_PREFIX + LAYER_SCALAR,
                hf_names=(layer + "layer_scalar",),
                sharding="replicate",
            )
        )
    return (
        ParameterEntry(
            megatron_name="embedding.word_embeddings.weight",
            hf_names=(embedding,),
            sharding="vocab",
        ),
        ParameterEntry(
            megatron_name="decoder.final_layernorm.weight",
            hf_names=(body + "norm.weight",),
            sharding="replicate",
        ),
        ParameterEntry(
            megatron_name="output_layer.weight",
            hf_names=(embedding if decoder.tied_head else head + "weight",),
            sharding="vocab",
            is_tied=decoder.tied_head,
        ),
        ParameterEntry(
            megatron_name=MEGATRON_LAYER_PREFIX + "input_layernorm.weight",
            hf_names=(layer + "input_layernorm.weight",),
            sharding="replicate",
        ),
        *optional,
        ParameterEntry(
            megatron_name=MEGATRON_LAYER_PREFIX + "pre_mlp_layernorm.weight",
            hf_names=(layer + f"{pre_mlp_norm}.weight",),
            sharding="replicate",
        ),
        ParameterEntry(
            megatron_name=MEGATRON_LAYER_PREFIX + "mlp.linear_fc1.weight",
            hf_names=tuple(layer + name for name in gate_up),
            sharding="gated",
            is_linear=True,
        ),
        ParameterEntry(
            megatron_name=MEGATRON_LAYER_PREFIX + "mlp.linear_fc2.weight",
            hf_names=(layer + "mlp.down_proj.weight",),
            sharding="row",
            is_linear=True,
        ),
    )


def _attention_entries(
    decoder: Decoder, layer: str, qkv: tuple[str, ...], layers: frozenset[int] | None
) -> list[ParameterEntry]:
    """Return the entries of the attention of some layers.

    Args:
        decoder: says which biases and norms there are.
        layer: prefix of the published names in a layer.
        qkv: names within a layer of q, k and, unless the value is the output of k, v; or of the
            one tensor that fuses them.
        layers: the layers; None: all.
    """
    attention, names = MEGATRON_LAYER_PREFIX + "self_attention.", [layer + name for name in qkv]
    sharding: Sharding = "qk" if len(qkv) == 2 else "qkv"
    entries = [
        ParameterEntry(
            megatron_name=attention + "linear_qkv.weight",
            hf_names=tuple(names),
            sharding=sharding,
            is_linear=True,
            layers=layers,
        ),
        ParameterEntry(
            megatron_name=attention + "linear_proj.weight",
            hf_names=(layer + "self_attn.o_proj.weight",),
            sharding="row",
            is_linear=True,
            layers=layers,
        ),
    ]
    if decoder.qkv_bias:
        entries.append(
            ParameterEntry(
                megatron_name=attention + "linear_qkv.bias",
                hf_names=tuple(name.removesuffix("weight") + "bias" for name in names),
                sharding=sharding,
                layers=layers,
            )
        )
    if decoder.qk_norm:
        entries += [
            ParameterEntry(
                megatron_name=attention + f"{part}_layernorm.weight",
                hf_names=(layer + f"self_attn.{part}_norm.weight",),
                sharding="replicate",
                layers=layers,
            )
            for part in "qk"
        ]
    return entries


def llama_decoder(family: str, text_config: Any, key: str = "text_config") -> Decoder:
    """Return the decoder of transformers' LlamaConfig, MistralConfig or a similar config.

    Args:
        family: name of the family, for messages.
        text_config: transformers config of the decoder.
        key: key of the decoder config in config.json, for messages.

    Raises:
        UserError: the config has a value that the parameter map does not support.
    """
    rope = dict(text_config.to_dict().get("rope_parameters") or {})
    require_values(
        family,
        {
            "tie_word_embeddings": (text_config.tie_word_embeddings, False),
            "rope type": (rope.get("rope_type", "default"), "default"),
        },
    )
    check_plain_layers(family, text_config, key)
    return decoder_from_sizes(family, text_config, rope.get("rope_theta", 10000.0))


def check_plain_layers(family: str, text_config: Any, key: str) -> None:
    """Require linears without biases, and SiLU.

    Raises:
        UserError: the config has another value.
    """
    require_values(
        family,
        {
            f"{key}.attention_bias": (getattr(text_config, "attention_bias", False), False),
            f"{key}.mlp_bias": (getattr(text_config, "mlp_bias", False), False),
            f"{key}.hidden_act": (text_config.hidden_act, "silu"),
        },
    )


def decoder_from_sizes(
    family: str, text_config: Any, rope_theta: Any, *, has_sliding_window: bool = False
) -> Decoder:
    """Return the decoder with the sizes of a transformers config, which must be consistent.

    Args:
        family: name of the family, for messages.
        text_config: transformers config of the decoder.
        rope_theta: base of the rotary embedding.
        has_sliding_window: whether the caller adds a sliding window to the decoder.

    Raises:
        UserError: a size is no positive number, heads do not divide evenly, or attention is
            limited to a sliding window.
    """
    heads, kv_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    head_dim = getattr(text_config, "head_dim", None)
    sizes = [
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "vocab_size"),
    ]
    integers = {key: getattr(text_config, key) for key in sizes}
    require_positive(family, integers | ({} if head_dim is None else {"head_dim": head_dim}), int)
    numbers = {"rms_norm_eps": text_config.rms_norm_eps, "rope_theta": rope_theta}
    require_positive(family, numbers, float)
    if heads % kv_heads:
        raise UserError(
            f"{family}: num_attention_heads must be a multiple of num_key_value_heads {kv_heads}, "
            f"got {heads}"
        )
    if text_config.hidden_size % heads and not head_dim:
        raise UserError(
            f"{family}: hidden_size must be a multiple of num_attention_heads {heads}, got "
            f"{text_config.hidden_size}"
        )
    max_positions = text_config.max_position_embeddings
    window = getattr(text_config, "sliding_window", None)
    if not has_sliding_window and window is not None and window < max_positions:
        raise UserError(
            f"{family}: sliding_window must be null or at least max_position_embeddings "
            f"{max_positions}, got {window}; only full attention is supported"
        )
    return Decoder(
        hidden=text_config.hidden_size,
        ffn=text_config.intermediate_size,
        layers=text_config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or text_config.hidden_size // heads,
        vocab=text_config.vocab_size,
        norm_eps=text_config.rms_norm_eps,
        rope_theta=rope_theta,
        max_positions=max_positions,
    )

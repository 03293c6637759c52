"""What a decoder is made of, as data that build, parameter map, exporters and readers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes

HEAD_NORMS = ("q_layernorm", "k_layernorm")  # modules whose weight is that of one head
LAYER_SCALAR = "mlp_bda.layer_scalar"  # parameter of a layer


@dataclass(frozen=True)
class LongRope:
    """Rescaling of rotary frequencies for long contexts, as in Phi-3.

    Frequencies are divided by short_factors [head_dim / 2], or by long_factors [head_dim / 2] in
    sequences longer than original_max_positions. attention_factor multiplies cosine and sine.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


@dataclass(frozen=True)
class ScaledRope:
    """Rotary frequencies that are no powers of one base, as in Llama 3.1 and YaRN.

    frequencies: [head_dim / 2], radians per position, of layers with full attention.
    attention_factor multiplies cosine and sine.
    """

    frequencies: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True)
class MRope:
    """Rotary embedding of three positions per token: temporal, height and width, as in Qwen-VL.

    sections: frequencies, of head_dim / 2, that take each of the three positions.
    interleaved: whether they alternate, temporal first, until a section is used up; otherwise each
        section is contiguous.
    """

    sections: tuple[int, int, int]
    interleaved: bool


@dataclass(frozen=True)
class SlidingWindow:
    """Layers in which a token attends to the last `size` tokens, itself among them, as in Gemma.

    layers: whether each layer is one. rope_theta: of these layers.
    """

    size: int
    layers: tuple[bool, ...]
    rope_theta: float


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention of some layers, all of which have the same number of query heads.

    v_from_k: there is no v_proj; the output of k_proj, without norm and rotation, is the value.
    """

    kv_heads: int
    head_dim: int
    v_from_k: bool = False


@dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet, a recurrence that stands in place of the attention of some layers.

    layers: whether each layer has it. kernel: tokens of its convolution.
    """

    layers: tuple[bool, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, by its name within a layer's DeltaNet."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return {
            "self_attention.A_log": (self.value_heads,),
            "self_attention.dt_bias": (self.value_heads,),
            "conv1d": (2 * keys + values, 1, self.kernel),
            "in_proj_qkv": (2 * keys + values, hidden),
            "in_proj_z": (values, hidden),
            "in_proj_a": (self.value_heads, hidden),
            "in_proj_b": (self.value_heads, hidden),
            "norm": (self.value_dim,),
            "out_proj": (hidden, values),
        }


@dataclass(frozen=True)
class Decoder:
    """Architecture of a decoder, with every default of its config filled in.

    qkv_bias: q, k and v have a bias.
    qk_norm: each head of q and k has an RMSNorm before rotation.
    tied_head: the output layer is the embedding.
    deepstack_layers: first layers behind which features of the vision tower are added.
    sliding_window: which layers have one; None: full attention in all.
    full_attention: sizes of the layers without a sliding window; None: as those with one.
    v_norm: each head of v has an RMSNorm without weight; only with a sliding window.
    zero_centered_norms: RMSNorms multiply by 1 + weight, in float32.
    post_norms: the outputs of attention and of the MLP have a norm before they are added.
    layer_scalar: the output of each layer is multiplied by a number; only with post_norms.
    activation: of the gate of the MLP.
    attention_scale: factor of q k^T; None: head_dim ** -0.5.
    scaled_embedding: embeddings of tokens are multiplied by hidden ** 0.5.
    logit_softcap: logits are tanh(logits / softcap) * softcap; None: as they are.
    bidirectional_images: layers in which tokens of an image attend to all tokens of the same image:
        none, those with a sliding window, or all.
    output_gate: q_proj gives, for each head, the query and a gate of the head's output.
    rotary_dim: numbers of a head that are rotated, the first ones; None: all.
    delta_net: which layers have a DeltaNet; None: attention in all.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    long_rope: LongRope | None = None
    mrope: MRope | None = None
    scaled_rope: ScaledRope | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    deepstack_layers: int = 0
    sliding_window: SlidingWindow | None = None
    full_attention: AttentionShape | None = None
    v_norm: bool = False
    zero_centered_norms: bool = False
    post_norms: bool = False
    layer_scalar: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None
    scaled_embedding: bool = False
    logit_softcap: float | None = None
    bidirectional_images: Literal["none", "sliding", "all"] = "none"
    output_gate: bool = False
    rotary_dim: int | None = None
    delta_net: DeltaNet | None = None

    @property
    def attention_layers(self) -> frozenset[int] | None:
        """Layers with attention; None: all."""
        if self.delta_net is None:
            return None
        return frozenset(i for i, is_delta in enumerate(self.delta_net.layers) if not is_delta)

    def has_attention(self, layer: int) -> bool:
        """Return whether a layer has attention."""
        return self.attention_layers is None or layer in self.attention_layers

    def attention(self, layer: int) -> AttentionShape:
        """Return the sizes of a layer's attention."""
        window = self.sliding_window
        if self.full_attention is not None and window is not None and not window.layers[layer]:
            return self.full_attention
        return AttentionShape(kv_heads=self.kv_heads, head_dim=self.head_dim)

    @property
    def attention_kinds(self) -> dict[AttentionShape, frozenset[int] | None]:
        """Sizes of attention -> the layers that have it; None: all."""
        own = AttentionShape(kv_heads=self.kv_heads, head_dim=self.head_dim)
        if self.full_attention in (None, own):
            return {own: self.attention_layers}
        kinds: dict[AttentionShape, frozenset[int] | None] = {}
        for layer in range(self.layers):
            shape = self.attention(layer)
            kinds[shape] = (kinds.get(shape) or frozenset()) | {layer}
        return kinds

    @property
    def kv_head_counts(self) -> tuple[int, ...]:
        """The different numbers of KV heads that layers have."""
        return tuple(dict.fromkeys(shape.kv_heads for shape in self.attention_kinds))

    @property
    def has_linear_values(self) -> bool:
        """Whether scaling rows of v_proj scales the values; then it can absorb o_proj's scale."""
        return not self.v_norm and not any(shape.v_from_k for shape in self.attention_kinds)

    @property
    def most_q_features(self) -> int:
        """Most input features of o_proj that a layer has."""
        return self.heads * max(shape.head_dim for shape in self.attention_kinds)

    def q_features(self, layer: int = 0) -> int:
        """Return the output features of a layer's q_proj, gates included."""
        return self.heads * self.attention(layer).head_dim * (1 + self.output_gate)

    @property
    def feature_width(self) -> int:
        """Numbers per image token that the tower gives: its features, and those for deepstack."""
        return self.hidden * (1 + self.deepstack_layers)

    def sizes(self, vocab_multiple: int, layer: int = 0) -> HeadSizes:
        """Return the sizes that sharding needs.

        Args:
            vocab_multiple: the vocabulary is padded to a multiple of it.
            layer: whose attention.
        """
        shape = self.attention(layer)
        return HeadSizes(
            heads=self.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab=self.vocab,
            padded_vocab=-(-self.vocab // vocab_multiple) * vocab_multiple,
            output_gate=self.output_gate,
        )

    def shapes(self, parameter_map: tuple[ParameterEntry, ...]) -> dict[str, tuple[int, ...]]:
        """Return the published name and shape of every decoder tensor, for every layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for entry in parameter_map:
            for name, shape in zip(entry.hf_names, self._tensor_shapes(entry), strict=True):
                if not entry.per_layer:
                    shapes[name] = shape
                    continue
                for layer in filter(entry.in_layer, range(self.layers)):
                    shapes[name.replace("{i}", str(layer))] = shape
        return shapes

    def _tensor_shapes(self, entry: ParameterEntry) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of an entry's tensors in a layer."""
        shape, hidden = self.attention(entry.first_layer), self.hidden
        query, key = self.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        q_and_k = (self.q_features(entry.first_layer), hidden), (key, hidden)
        own = {} if self.delta_net is None else self.delta_net.shapes(hidden)
        own |= dict.fromkeys(HEAD_NORMS, (shape.head_dim,)) | {LAYER_SCALAR: (1,)}
        if entry.module_name in own:
            return (own[entry.module_name],)
        by_sharding = {
            "qkv": (*q_and_k, (key, hidden)),
            "qk": q_and_k,
            "gated": ((self.ffn, hidden), (self.ffn, hidden)),
            "vocab": ((self.vocab, hidden),),
            "replicate": ((hidden,),),
        }
        width = query if "attention" in entry.megatron_name else self.ffn
        tensors = by_sharding.get(entry.sharding, ((hidden, width),))
        if entry.megatron_name.endswith(".bias"):
            tensors = tuple(one[:1] for one in tensors)
        if entry.is_fused:
            tensors = ((sum(one[0] for one in tensors), *tensors[0][1:]),)
        return tensors

"""What a decoder is made of, as data that build, parameter map, exporters and readers share."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes

HEAD_NORMS = ("q_layernorm", "k_layernorm")  # modules whose weight is that of one head


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

    frequencies: [head_dim / 2], radians per position. attention_factor multiplies cosine and sine.
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
class Decoder:
    """Architecture of a decoder, with every default of its config filled in.

    qkv_bias: q, k and v have a bias.
    qk_norm: each head of q and k has an RMSNorm before rotation.
    tied_head: the output layer is the embedding.
    deepstack_layers: first layers behind which features of the vision tower are added.
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

    @property
    def feature_width(self) -> int:
        """Numbers per image token that the tower gives: its features, and those for deepstack."""
        return self.hidden * (1 + self.deepstack_layers)

    def sizes(self, vocab_multiple: int) -> HeadSizes:
        """Return the sizes that sharding needs, with the vocabulary padded to a multiple."""
        return HeadSizes(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab=self.vocab,
            padded_vocab=-(-self.vocab // vocab_multiple) * vocab_multiple,
        )

    def shapes(self, parameter_map: tuple[ParameterEntry, ...]) -> dict[str, tuple[int, ...]]:
        """Return the published name and shape of every decoder tensor, for every layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        by_sharding = {
            "qkv": ((query, self.hidden), (key, self.hidden), (key, self.hidden)),
            "gated": ((self.ffn, self.hidden), (self.ffn, self.hidden)),
            "vocab": ((self.vocab, self.hidden),),
            "replicate": ((self.hidden,),),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for entry in parameter_map:
            width = query if "attention" in entry.megatron_name else self.ffn
            tensors = by_sharding.get(entry.sharding, ((self.hidden, width),))
            if entry.module_name in HEAD_NORMS:
                tensors = ((self.head_dim,),)
            if entry.megatron_name.endswith(".bias"):
                tensors = tuple(shape[:1] for shape in tensors)
            if entry.is_fused:
                tensors = ((sum(shape[0] for shape in tensors), *tensors[0][1:]),)
            for name, shape in zip(entry.hf_names, tensors, strict=True):
                for layer in range(self.layers if entry.per_layer else 1):
                    shapes[name.replace("{i}", str(layer))] = shape
        return shapes

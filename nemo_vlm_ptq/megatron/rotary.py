"""Rotary frequencies of Phi-3's long context, which megatron-core does not have."""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.families.base import Decoder, LongRope


class LongRotaryEmbedding(RotaryEmbedding):
    """Frequencies divided by the short factors, or by the long ones for all of a long sequence."""

    def __init__(self, decoder: Decoder, long_rope: LongRope) -> None:
        super().__init__(
            kv_channels=decoder.head_dim,
            rotary_percent=1.0,
            rotary_base=decoder.rope_theta,
            use_cpu_initialization=True,
        )
        self.long_rope = long_rope
        dim = decoder.head_dim  # in the order of operations of transformers, to the bit
        self.base = decoder.rope_theta ** (torch.arange(0, dim, 2).float() / dim)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles [S,head_dim/2] of a sequence of S tokens."""
        rope = self.long_rope
        factors = rope.long if max_seq_len + offset > rope.original else rope.short
        frequencies = 1.0 / (torch.tensor(factors) * self.base)
        positions = torch.arange(max_seq_len, dtype=torch.float32) + offset
        return torch.outer(positions, frequencies).to(self.inv_freq.device)


def use_long_rope(model: GPTModel, decoder: Decoder, long_rope: LongRope) -> None:
    """Give a model these frequencies, and its cosines and sines their scale.

    megatron-core scales cosines and sines for YaRN alone, by (0.1 a ln f + 1) / (0.1 b ln f + 1)
    with f, a and b from the config; f = e^10, a = scale - 1 and b = 0 make that the scale.
    """
    model.rotary_pos_emb = LongRotaryEmbedding(decoder, long_rope)
    settings = {"rotary_scaling_factor": math.exp(10), "mscale": long_rope.scale - 1}
    for name, value in (settings | {"mscale_all_dim": 0.0}).items():
        setattr(model.config, f"yarn_{name}", value)

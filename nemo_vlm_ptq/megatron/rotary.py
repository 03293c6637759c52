"""Rotary embeddings as transformers computes them: scaled, LongRoPE, mRoPE, and of two bases."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.families.decoder import (
    Decoder,
    LongRope,
    MRope,
    ScaledRope,
    SlidingWindow,
)


class LongRotaryEmbedding(RotaryEmbedding):
    """LongRoPE frequencies: short factors, or long factors for long sequences.

    A sequence is long if it exceeds `original_max_positions`. The factors apply to all of its
    positions, as in transformers.
    """

    def __init__(self, decoder: Decoder, long_rope: LongRope) -> None:
        super().__init__(
            kv_channels=decoder.head_dim,
            rotary_percent=1.0,
            rotary_base=decoder.rope_theta,
            use_cpu_initialization=True,
        )
        self.long_rope = long_rope
        dim = decoder.head_dim  # operations in transformers' order, for bitwise equal frequencies
        self.base = decoder.rope_theta ** (torch.arange(0, dim, 2).float() / dim)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles [S,head_dim/2] of a sequence of S tokens."""
        rope = self.long_rope
        is_long = max_seq_len + offset > rope.original_max_positions
        factors = rope.long_factors if is_long else rope.short_factors
        frequencies = 1.0 / (torch.tensor(factors) * self.base)
        positions = torch.arange(max_seq_len, dtype=torch.float32) + offset
        return torch.outer(positions, frequencies).to(self.inv_freq.device)


def apply_long_rope(model: GPTModel, decoder: Decoder, long_rope: LongRope) -> None:
    """Replace the rotary embedding of a model and set the attention scaling of LongRoPE."""
    model.rotary_pos_emb = LongRotaryEmbedding(decoder, long_rope)
    _scale_cosine_and_sine(model, long_rope.attention_factor)


def _scale_cosine_and_sine(model: GPTModel, factor: float) -> None:
    """Multiply cosine and sine by a factor.

    megatron-core scales them only for YaRN, by (0.1 a ln f + 1) / (0.1 b ln f + 1) with f, a and b
    from the config. f = e^10, a = factor - 1 and b = 0 give the factor.
    """
    config = model.config
    config.yarn_rotary_scaling_factor = math.exp(10)
    config.yarn_mscale = factor - 1
    config.yarn_mscale_all_dim = 0.0


def apply_scaled_rope(model: GPTModel, rope: ScaledRope) -> None:
    """Replace the frequencies of a model, and scale cosine and sine."""
    rotary = model.rotary_pos_emb
    rotary.inv_freq = torch.tensor(rope.frequencies, device=rotary.inv_freq.device)
    _scale_cosine_and_sine(model, rope.attention_factor)


class MRotaryEmbedding(torch.nn.Module):
    """Angles of three positions per token, each of which turns some of the frequencies."""

    def __init__(self, decoder: Decoder, mrope: MRope, device: torch.device) -> None:
        super().__init__()
        dim = decoder.rotary_dim or decoder.head_dim
        # Operations in transformers' order, for bitwise equal frequencies.
        base = decoder.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
        # Not a buffer, which would take the model's dtype.
        self.inverse_frequencies = (1.0 / base).to(device)
        self.row = _position_rows(mrope).to(device)

    def forward(self, positions: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the angles [S,B,1,rotary_dim] float32 of positions [3,B,S]."""
        angles = positions[..., None].float() * self.inverse_frequencies
        row = self.row[None, None, None].expand(1, *angles.shape[1:])
        chosen = angles.gather(0, row)[0]
        return torch.cat((chosen, chosen), dim=-1).transpose(0, 1)[:, :, None].contiguous()


def _position_rows(mrope: MRope) -> torch.Tensor:
    """Return which of the three positions turns each frequency, [rotary_dim/2] int64."""
    row = torch.arange(3).repeat_interleave(torch.tensor(mrope.sections))
    if mrope.interleaved:
        row = torch.zeros_like(row)
        for index in (1, 2):
            row[index : 3 * mrope.sections[index] : 3] = index
    return row


def apply_mrope(model: GPTModel, decoder: Decoder, mrope: MRope, device: torch.device) -> None:
    """Replace the rotary embedding of a model; its forward pass then needs positions [3,B,S]."""
    model.rotary_pos_emb = MRotaryEmbedding(decoder, mrope, device)
    model.position_embedding_type = "mrope"
    model.mrope_section = list(mrope.sections)


class SlidingWindowRotaryEmbedding(torch.nn.Module):
    """Angles of layers with full attention, and of layers with a sliding window.

    Args:
        full: [head_dim/2] float32, frequencies of layers with full attention.
        sliding: [head_dim/2] float32, frequencies of layers with a sliding window, whose heads may
            have another size.
    """

    def __init__(self, full: torch.Tensor, sliding: torch.Tensor) -> None:
        super().__init__()
        self.frequencies = full, sliding  # not buffers, which would take the model's dtype

    def get_rotary_seq_len(self, _: Any, block: Any, states: Any, *__: Any) -> int:
        """Return the number of tokens of the hidden states [S,B,H] that a block is given."""
        return len(states if block.input_tensor is None else block.input_tensor)

    def forward(self, length: int, **_: Any) -> list[torch.Tensor]:
        """Return two tensors of angles [S,1,1,head_dim] float32."""
        angles = []
        for frequencies in self.frequencies:
            positions = torch.arange(length, dtype=torch.float32, device=frequencies.device)
            half = torch.outer(positions, frequencies)
            angles.append(torch.cat((half, half), dim=-1)[:, None, None])
        return angles


def apply_sliding_window(
    model: GPTModel, decoder: Decoder, sliding_window: SlidingWindow, device: torch.device
) -> None:
    """Set the sliding windows of a model, and replace its rotary embedding by one of two bases.

    Layers must have their indices in the whole model, and full attention its frequencies.
    """
    full, head_dim = model.rotary_pos_emb.inv_freq.to(device), decoder.head_dim  # was on the CPU
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    sliding = (1.0 / (sliding_window.rope_theta**exponents)).to(device)
    model.rotary_pos_emb = SlidingWindowRotaryEmbedding(full, sliding)
    for block in model.decoder.layers:
        if sliding_window.layers[block.layer_number - 1]:
            block.self_attention.core_attention.sliding_window = sliding_window.size
        elif decoder.bidirectional_images == "sliding":
            block.self_attention.core_attention.is_causal = True

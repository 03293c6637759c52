"""Running a read checkpoint: transformers' decoder with its linears replaced, and the tower.

Weights are dequantized; activations are scaled and rounded as the consumer would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import ImageInputs, ModelFamily, Sample
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint, ReadKv, ReadLinear
from nemo_vlm_ptq.reference.number_formats import fake_quantize_values
from nemo_vlm_ptq.utils.pinned_memory import to_device


class SimulatedLinear(nn.Module):
    """x -> round(x * prequant) W^T, with the rounding of the format, and a branch beside it."""

    def __init__(self, linear: ReadLinear, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = linear.values(device).weight.to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.pre_quant_scale = (
            None if linear.pre_quant_scale is None else linear.pre_quant_scale.to(device, dtype)
        )
        self.branch = [part.to(device, dtype) for part in linear.low_rank or ()]
        self.scale = None if linear.input_scale is None else linear.input_scale.to(device)
        self.rounding = linear.rounding
        self.rounds = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [...,K] -> [...,O]."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        seen = x
        if self.rounding is not None and self.rounds:
            seen = fake_quantize_values(x, self.rounding, self.scale)
        out = nn.functional.linear(seen, self.weight)
        if self.branch:
            down, up = self.branch
            out = out + nn.functional.linear(nn.functional.linear(x, down), up)
        return out


class ReferenceModel:
    """A checkpoint that answers: images to features, samples to logits or to new tokens."""

    def __init__(
        self,
        family: ModelFamily,
        config: Mapping[str, Any],
        checkpoint: ReadCheckpoint,
        vision: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.decoder = _build_decoder(family, config, checkpoint, dtype, device)
        self.kv = checkpoint.kv and _on(checkpoint.kv, device)
        self.rounds = True
        self.vision = family.build_vision(config, vision, device, dtype)
        eos = self.decoder.generation_config.eos_token_id
        self.stop = set(eos if isinstance(eos, list) else [eos])

    def round_activations(self, rounds: bool) -> None:
        """Round inputs of linears, keys and values as the consumer does, or do not.

        Without, two readers agree exactly.
        """
        self.rounds = rounds
        for module in self.decoder.modules():
            if isinstance(module, SimulatedLinear):
                module.rounds = rounds

    def _cache(self) -> Any:
        """A fresh cache that rounds; None leaves it to transformers."""
        if self.kv is None or not self.rounds:
            return None
        from nemo_vlm_ptq.reference.kv_cache import FakeQuantizedCache

        return FakeQuantizedCache(self.decoder.config, self.kv)

    @torch.no_grad()
    def encode(self, pixels: ImageInputs) -> torch.Tensor:
        """Images -> features [image tokens,H]."""
        return self.vision(pixels.to(self.device, self.dtype))

    def _embed(
        self, samples: Sequence[Sample], features: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded embeddings [B,S,H] and mask [B,S]."""
        length = max(len(sample.input_ids) for sample in samples)
        width = self.decoder.config.hidden_size
        table = self.decoder.get_input_embeddings()
        embedded = torch.zeros(len(samples), length, width, dtype=self.dtype, device=self.device)
        mask = torch.zeros(len(samples), length, dtype=torch.int64, device=self.device)
        for row, (sample, feature) in enumerate(zip(samples, features, strict=True)):
            start = length - len(sample.input_ids)
            tokens = table(sample.input_ids.clamp(min=0).to(self.device))
            if feature is not None:
                tokens[sample.is_image.to(self.device)] = feature.to(self.device, self.dtype)
            embedded[row, start:], mask[row, start:] = tokens, 1
        return embedded, mask

    @torch.no_grad()
    def logits(
        self, sample: Sample, feature: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [S,V] float32 of one sample; mask [S] is 0 where attention must not look."""
        embedded, whole = self._embed([sample], [feature])
        given = whole if mask is None else mask[None].to(self.device)
        out = self.decoder(
            inputs_embeds=embedded, attention_mask=given, past_key_values=self._cache()
        )
        return out.logits[0].float()

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        features: Sequence[torch.Tensor | None],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """New token ids of each sample, greedy with a KV cache, up to the stop token."""
        embedded, mask = self._embed(samples, features)
        tokens = self.decoder.generate(
            inputs_embeds=embedded,
            attention_mask=mask,
            past_key_values=self._cache(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=next(iter(self.stop)),
        )
        return [_until(row, self.stop) for row in tokens.tolist()]


def _on(kv: ReadKv, device: torch.device) -> ReadKv:
    return ReadKv(kv.rounding, kv.key.to(device), kv.value.to(device))


def _until(tokens: list[int], stop: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop:
            return tokens[:index]
    return tokens


def _build_decoder(
    family: ModelFamily,
    config: Mapping[str, Any],
    checkpoint: ReadCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """transformers' causal model of the family's decoder, filled from the checkpoint.

    Raises:
        ProofError: a tensor of the decoder is missing.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family.text_config(config), dtype=dtype)
    for name, linear in checkpoint.linears.items():
        path = name.removeprefix(family.decoder_prefix)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, SimulatedLinear(linear, dtype, device))
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        tensor = checkpoint.plain.get(family.decoder_prefix + name)
        if tensor is None or tensor.shape != parameter.shape:
            raise VerificationError(
                f"tensor {family.decoder_prefix + name} is missing or misshapen"
            )
        parent, _, leaf = name.rpartition(".")
        fresh = nn.Parameter(to_device(tensor, device).to(dtype), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, fresh)
    _rebuild_rotary(model, device)
    return model.eval()


def _rebuild_rotary(model: Any, device: torch.device) -> None:
    """Rotary frequencies are computed, not stored; compute them on the real device."""
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(model.config).to(device)

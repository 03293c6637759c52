"""Run a checkpoint that was read back, with transformers' decoder and the vision module.

Weights are dequantized and activations fake-quantized as the consumer of the checkpoint would. This
costs the memory of an unquantized model and the time of fake quantization.

Legend: B batch, S sequence, H hidden size, V vocabulary, K input and O output features, R rank of
the low-rank branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import ImageInputs, ModelFamily, Sample
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint, ReadKvCache, ReadLinear
from nemo_vlm_ptq.reference.number_formats import fake_quantize_values
from nemo_vlm_ptq.utils.pinned_memory import to_device


class FakeQuantizedLinear(nn.Module):
    """Linear with a dequantized weight, a fake-quantized input and an optional low-rank branch."""

    def __init__(self, linear: ReadLinear, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight_OK = linear.dequantize(device).weight.to(dtype)
        self.weight = nn.Parameter(weight_OK, requires_grad=False)
        self.pre_quant_scale = (
            None if linear.pre_quant_scale is None else linear.pre_quant_scale.to(device, dtype)
        )
        self.low_rank = [factor.to(device, dtype) for factor in linear.low_rank or ()]
        self.input_scale = None if linear.input_scale is None else linear.input_scale.to(device)
        self.input_format = linear.input_format
        self.quantize_input = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [...,K] to [...,O]."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        quantized = x
        if self.input_format is not None and self.quantize_input:
            quantized = fake_quantize_values(x, self.input_format, self.input_scale)
        out = nn.functional.linear(quantized, self.weight)
        if self.low_rank:
            a_RK, b_OR = self.low_rank
            out = out + nn.functional.linear(nn.functional.linear(x, a_RK), b_OR)
        return out


class ReferenceModel:
    """Vision-language model built from a checkpoint that was read back."""

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
        self.kv = checkpoint.kv and _kv_to_device(checkpoint.kv, device)
        self.quantize_activations = True
        self.vision = family.build_vision(config, vision, device, dtype)
        eos = self.decoder.generation_config.eos_token_id
        self.eos_token_ids = set(eos if isinstance(eos, list) else [eos])

    def set_activation_quantization(self, enabled: bool) -> None:
        """Enable or disable fake quantization of linear inputs, keys and values.

        With it disabled, outputs depend on the weights alone, and two readers agree exactly.
        """
        self.quantize_activations = enabled
        for module in self.decoder.modules():
            if isinstance(module, FakeQuantizedLinear):
                module.quantize_input = enabled

    def _cache(self) -> Any:
        """Create an empty fake-quantized KV cache; None selects transformers' default cache."""
        if self.kv is None or not self.quantize_activations:
            return None
        from nemo_vlm_ptq.reference.kv_cache import FakeQuantizedCache

        return FakeQuantizedCache(self.decoder.config, self.kv)

    @torch.no_grad()
    def encode_images(self, images: ImageInputs) -> torch.Tensor:
        """Encode images to features [image tokens,H]."""
        return self.vision(images.to(self.device, self.dtype))

    def _embed(
        self, samples: Sequence[Sample], features: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge token embeddings and image features, left-padded.

        Returns:
            Embeddings [B,S,H] and attention mask [B,S].
        """
        length = max(len(sample.input_ids) for sample in samples)
        hidden = self.decoder.config.hidden_size
        embedding = self.decoder.get_input_embeddings()
        embeds = torch.zeros(len(samples), length, hidden, dtype=self.dtype, device=self.device)
        mask = torch.zeros(len(samples), length, dtype=torch.int64, device=self.device)
        for i, (sample, feature) in enumerate(zip(samples, features, strict=True)):
            start = length - len(sample.input_ids)
            tokens = embedding(sample.input_ids.clamp(min=0).to(self.device))
            if feature is not None:
                tokens[sample.is_image.to(self.device)] = feature.to(self.device, self.dtype)
            embeds[i, start:], mask[i, start:] = tokens, 1
        return embeds, mask

    @torch.no_grad()
    def logits(
        self, sample: Sample, feature: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute logits [S,V] float32 of one sample; `mask` [S] is an attention mask."""
        embeds, full_mask = self._embed([sample], [feature])
        attention_mask = full_mask if mask is None else mask[None].to(self.device)
        out = self.decoder(
            inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=self._cache()
        )
        return out.logits[0].float()

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        features: Sequence[torch.Tensor | None],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Generate new token ids of each sample by greedy decoding, without the end token."""
        embeds, mask = self._embed(samples, features)
        tokens = self.decoder.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=self._cache(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=next(iter(self.eos_token_ids)),
        )
        return [_truncate_at_eos(ids, self.eos_token_ids) for ids in tokens.tolist()]


def _kv_to_device(kv: ReadKvCache, device: torch.device) -> ReadKvCache:
    return ReadKvCache(
        number_format=kv.number_format,
        key_scale=kv.key_scale.to(device),
        value_scale=kv.value_scale.to(device),
    )


def _truncate_at_eos(ids: list[int], eos_token_ids: set[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in eos_token_ids:
            return ids[:index]
    return ids


def _build_decoder(
    family: ModelFamily,
    config: Mapping[str, Any],
    checkpoint: ReadCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Build transformers' causal language model and load the checkpoint into it.

    The model is created on the meta device, so that no unquantized copy is initialized.

    Raises:
        VerificationError: a decoder tensor is missing or has another shape.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family.text_config(config), dtype=dtype)
    for name, linear in checkpoint.linears.items():
        path = name.removeprefix(family.decoder_prefix)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FakeQuantizedLinear(linear, dtype, device))
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        tensor = checkpoint.plain.get(family.decoder_prefix + name)
        if tensor is None or tensor.shape != parameter.shape:
            found = "it is missing" if tensor is None else f"got {tuple(tensor.shape)}"
            raise VerificationError(
                f"tensor {family.decoder_prefix + name} must have shape "
                f"{tuple(parameter.shape)}; {found}"
            )
        parent, _, leaf = name.rpartition(".")
        loaded = nn.Parameter(to_device(tensor, device).to(dtype), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, loaded)
    _rebuild_rotary(model, device)
    return model.eval()


def _rebuild_rotary(model: Any, device: torch.device) -> None:
    """Recompute the rotary frequencies on `device`; they are buffers that no checkpoint stores."""
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(model.config).to(device)

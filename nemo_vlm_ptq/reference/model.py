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
from nemo_vlm_ptq.reference.attention_masks import image_masks
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint, ReadKvCache, ReadLinear
from nemo_vlm_ptq.reference.number_formats import fake_quantize_values
from nemo_vlm_ptq.utils.pinned_memory import to_device


class FakeQuantizedLinear(nn.Module):
    """Linear with a dequantized weight, a fake-quantized input and an optional low-rank branch."""

    def __init__(self, linear: ReadLinear, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = None  # loaded like that of any linear
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
        out = nn.functional.linear(quantized, self.weight, self.bias)
        if self.low_rank:
            a_RK, b_OR = self.low_rank
            out = out + nn.functional.linear(nn.functional.linear(x, a_RK), b_OR)
        return out


class CausalLM(nn.Module):
    """transformers' text model and an output layer, under the names of its causal models."""

    def __init__(self, config: Any, dtype: torch.dtype, softcap: float | None) -> None:
        from transformers import AutoModel

        super().__init__()
        self.softcap = softcap
        self.model = AutoModel.from_config(config, dtype=dtype)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def forward(self, *, last_only: bool = False, **inputs: Any) -> torch.Tensor:
        """Return logits [B,S,V], or [B,1,V] of the last token."""
        states = self.model(**inputs).last_hidden_state
        logits: torch.Tensor = self.lm_head(states[:, -1:] if last_only else states)
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap


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
        self.text_config = family.text_config(config)
        decoder = family.decoder(config)
        self.bidirectional_images = decoder.bidirectional_images
        self.has_delta_net = decoder.delta_net is not None
        self.decoder = _build_decoder(family, config, checkpoint, dtype, device)
        self.kv = checkpoint.kv and _kv_to_device(checkpoint.kv, device)
        self.quantize_activations = True
        self.vision = family.build_vision(config, vision, device, dtype)
        eos = getattr(self.text_config, "eos_token_id", None)  # not all configs have it
        self.eos_token_ids = set(eos if isinstance(eos, list) else [eos]) - {None}

    def set_activation_quantization(self, enabled: bool) -> None:
        """Enable or disable fake quantization of linear inputs, keys and values.

        With it disabled, outputs depend on the weights alone, and two readers agree exactly.
        """
        self.quantize_activations = enabled
        for module in self.decoder.modules():
            if isinstance(module, FakeQuantizedLinear):
                module.quantize_input = enabled

    def _cache(self) -> Any:
        """Create an empty KV cache, fake-quantized if the checkpoint has scales for it."""
        from nemo_vlm_ptq.reference.kv_cache import make_cache

        return make_cache(self.text_config, self.kv if self.quantize_activations else None)

    @torch.no_grad()
    def encode_images(self, images: ImageInputs) -> torch.Tensor:
        """Encode images to features [image tokens,H], or more for deepstack."""
        return self.vision(images.to(self.device, self.dtype))

    def _embed(
        self, samples: Sequence[Sample], features: Sequence[torch.Tensor | None]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the text model's inputs, left-padded: embeddings with image features merged in.

        Returns:
            inputs_embeds [B,S,H], attention_mask [B,S], position_ids [B,S] or [3,B,S]; with
            deepstack also visual_pos_masks [B,S] and deepstack_visual_embeds, [n,H] per layer.
            And where the image tokens are, [B,S] bool.
        """
        length, device = max(len(sample.input_ids) for sample in samples), self.device
        hidden, count = self.text_config.hidden_size, len(samples)
        embedding = self.decoder.model.get_input_embeddings()
        embeds = torch.zeros(count, length, hidden, dtype=self.dtype, device=device)
        mask = torch.zeros(count, length, dtype=torch.int64, device=device)
        positions = torch.zeros(3, count, length, dtype=torch.int64, device=device)
        is_image, deeper = mask.bool(), list[torch.Tensor]()
        for i, (sample, feature) in enumerate(zip(samples, features, strict=True)):
            start = length - len(sample.input_ids)
            tokens = embedding(sample.input_ids.clamp(min=0).to(device))
            counted = torch.arange(len(tokens)) if sample.positions is None else sample.positions
            positions[:, i, start:] = counted.to(device)
            if feature is not None:
                plain, rest = feature.to(device, self.dtype).tensor_split([hidden], dim=1)
                tokens[sample.is_image.to(device)] = plain
                is_image[i, start:] = sample.is_image.to(device)
                deeper += [rest] if rest.shape[1] else []
            embeds[i, start:], mask[i, start:] = tokens, 1
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        if samples[0].positions is None:
            inputs["position_ids"] = positions[0]
        if not deeper:
            return inputs, is_image
        layers = torch.cat(deeper).split(hidden, dim=1)
        deep = {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(layers)}
        return {**inputs, **deep}, is_image

    def _prefill(self, inputs: dict[str, Any], is_image: torch.Tensor) -> dict[str, Any]:
        """Return the inputs of a first pass; of text that goes on, attention is causal."""
        if self.bidirectional_images == "none" or not bool(is_image.any()):
            return inputs
        masks = image_masks(
            inputs["attention_mask"],
            is_image,
            self.text_config.sliding_window,
            full_is_causal=self.bidirectional_images == "sliding",
        )
        return {**inputs, "attention_mask": masks}

    @torch.no_grad()
    def logits(
        self, sample: Sample, feature: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute logits [S,V] float32 of one sample; `mask` [S] is an attention mask."""
        # transformers leaves masked tokens out of a DeltaNet in batches of several samples only
        copies = 2 if self.has_delta_net and mask is not None else 1
        inputs, is_image = self._embed([sample] * copies, [feature] * copies)
        if mask is not None:
            inputs["attention_mask"] = mask.expand(copies, -1).to(self.device)
        inputs = self._prefill(inputs, is_image)
        return self.decoder(**inputs, past_key_values=self._cache())[0].float()

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        features: Sequence[torch.Tensor | None],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Generate new token ids of each sample by greedy decoding, without the end token.

        transformers' `generate` does not take three positions per token beside embeddings.
        """
        (inputs, is_image), cache = self._embed(samples, features), self._cache()
        mask, position = inputs["attention_mask"], inputs["position_ids"][..., -1:]
        inputs = self._prefill(inputs, is_image)
        embedding = self.decoder.model.get_input_embeddings()
        chosen: list[torch.Tensor] = []
        ended = torch.zeros(len(samples), dtype=torch.bool, device=self.device)
        eos = torch.tensor(sorted(self.eos_token_ids), dtype=torch.int64, device=self.device)
        while len(chosen) < max_new_tokens and not bool(ended.all()):
            logits = self.decoder(last_only=True, **inputs, past_key_values=cache, use_cache=True)
            token = logits[:, -1].argmax(dim=-1)
            chosen.append(token)
            ended |= torch.isin(token, eos)
            mask, position = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), position + 1
            inputs = {
                "inputs_embeds": embedding(token)[:, None],
                "attention_mask": mask,
                "position_ids": position,
            }
        ids = torch.stack(chosen, dim=1).tolist() if chosen else [[] for _ in samples]
        return [_truncate_at_eos(row, self.eos_token_ids) for row in ids]


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
    described = family.decoder(config)
    with torch.device("meta"):
        model = CausalLM(family.text_config(config), dtype, described.logit_softcap)
    tied = described.tied_head
    for name, parameter in list(model.state_dict(keep_vars=True).items()):
        parent, _, leaf = name.rpartition(".")
        published = family.published_decoder_name(name)
        if tied and parent == "lm_head":
            published = family.published_decoder_name("model.embed_tokens.weight")
        linear = checkpoint.linears.get(published.removesuffix(".weight"))
        if linear is not None and leaf == "weight":
            outer, _, attribute = parent.rpartition(".")
            quantized = FakeQuantizedLinear(linear, dtype, device)
            setattr(model.get_submodule(outer), attribute, quantized)
            continue
        tensor = checkpoint.plain.get(published)
        if tensor is None or tensor.shape != parameter.shape:
            found = "it is missing" if tensor is None else f"got {tuple(tensor.shape)}"
            raise VerificationError(
                f"tensor {published} must have shape {tuple(parameter.shape)}; {found}"
            )
        loaded = nn.Parameter(to_device(tensor, device).to(dtype), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, loaded)
    _rebuild_buffers(model, device)
    return model.eval()


def _rebuild_buffers(model: Any, device: torch.device) -> None:
    """Recompute on `device` the buffers that no checkpoint stores."""
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(inner.config).to(device)
    if (factor := getattr(inner.embed_tokens, "scalar_embed_scale", None)) is not None:
        inner.embed_tokens.embed_scale = torch.tensor(factor, device=device)

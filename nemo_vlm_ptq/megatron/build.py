"""Build the shards of this rank of a decoder as a Megatron-core GPTModel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.megatron.attention import core_attention
from nemo_vlm_ptq.megatron.deepstack import add_deepstack
from nemo_vlm_ptq.megatron.fusion import use_fused_kernels
from nemo_vlm_ptq.megatron.layer_specs import block_spec
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.megatron.rotary import (
    apply_long_rope,
    apply_mrope,
    apply_scaled_rope,
    apply_sliding_window,
)

ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def transformer_config(
    decoder: Decoder,
    parallel: ParallelContext,
    dtype: torch.dtype,
    layers: int | None = None,
    *,
    fused: bool = False,
) -> TransformerConfig:
    """Return the TransformerConfig of a decoder.

    Args:
        decoder: sizes of the decoder.
        parallel: coordinates of this rank.
        dtype: of the parameters.
        layers: number of layers of a window; None: all layers, divided over pipeline stages.
        fused: use the kernels of megatron/fusion.py, which require CUDA.
    """
    return TransformerConfig(
        num_layers=layers or decoder.layers,
        hidden_size=decoder.hidden,
        ffn_hidden_size=decoder.ffn,
        num_attention_heads=decoder.heads,
        num_query_groups=decoder.kv_heads,
        kv_channels=decoder.head_dim,
        layernorm_epsilon=decoder.norm_eps,
        normalization="RMSNorm",
        activation_func=ACTIVATIONS[decoder.activation],
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=decoder.qkv_bias,
        qk_layernorm=decoder.qk_norm,
        attention_output_gate=decoder.output_gate,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=fused and decoder.activation == "silu",
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.layout.tensor,
        pipeline_model_parallel_size=1 if layers else parallel.layout.pipeline,
        hetereogenous_dist_checkpoint=True,  # one key per layer, so that layers load separately
    )


def build_decoder(
    decoder: Decoder,
    parallel: ParallelContext,
    dtype: torch.dtype,
    *,
    window: range | None = None,
    for_calibration: bool = False,
) -> GPTModel:
    """Build the decoder with uninitialized weights; logits are gathered over tensor ranks.

    Args:
        decoder: sizes of the decoder.
        parallel: coordinates and device of this rank.
        dtype: of the parameters.
        window: layers to build, in the whole model, with the embedding if the first is among them,
            and final norm and output layer if the last is; None: those of this pipeline stage.
        for_calibration: build the model that observe runs. It ends with the hidden states of the
            last layer, without final norm and output layer, and shards o_proj and down_proj along
            their outputs, so that the inputs of all linears are independent of the TP size.
    """
    first_layer = parallel.first_stage if window is None else window.start == 0
    last_layer = parallel.last_stage if window is None else window.stop == decoder.layers
    fused = for_calibration and parallel.device.type == "cuda"
    if fused:
        use_fused_kernels()
    layers = len(window) if window else None
    config = transformer_config(decoder, parallel, dtype, layers, fused=fused)
    count = decoder.layers // parallel.layout.pipeline
    stage = range(parallel.pipeline_rank * count, (parallel.pipeline_rank + 1) * count)
    spec = block_spec(decoder, config, window or stage, for_calibration=for_calibration)
    with parallel.device:  # allocate on the device instead of copying from the host
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=decoder.sizes(VOCAB_MULTIPLE).padded_vocab,
            max_sequence_length=decoder.max_positions,
            pre_process=first_layer,
            post_process=last_layer and not for_calibration,
            parallel_output=False,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=decoder.rope_theta,
        )
    if window is not None:
        for index, block in zip(window, model.decoder.layers, strict=True):
            block.layer_number = index + 1
    _complete(model, decoder, parallel.device)
    model.to(parallel.device, dtype).eval().requires_grad_(False)
    if decoder.delta_net is not None:
        from nemo_vlm_ptq.megatron.delta_net import keep_float32

        keep_float32(model)
    return model


def _complete(model: GPTModel, decoder: Decoder, device: torch.device) -> None:
    """Add to a model what megatron-core lacks; its layers have their numbers in the whole one."""
    for attention in map(core_attention, model.decoder.layers):
        if attention is not None:
            attention.scale = decoder.attention_scale
    if decoder.scaled_embedding and model.pre_process:
        model.embedding.register_forward_hook(partial(_scale, decoder.hidden**0.5))
    model.bidirectional_images = decoder.bidirectional_images != "none"
    if decoder.long_rope is not None:
        apply_long_rope(model, decoder, decoder.long_rope)
    if decoder.scaled_rope is not None:
        apply_scaled_rope(model, decoder.scaled_rope)
    if decoder.sliding_window is not None:
        apply_sliding_window(model, decoder, decoder.sliding_window, device)
    if decoder.logit_softcap is not None and model.post_process:
        model.output_layer.register_forward_hook(partial(_cap, decoder.logit_softcap))
    if decoder.mrope is not None:
        apply_mrope(model, decoder, decoder.mrope, device)
    if decoder.deepstack_layers and model.pre_process:
        add_deepstack(model, decoder.deepstack_layers)


def _scale(factor: float, _: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
    """Multiply embeddings by a factor that is rounded to their dtype, as transformers does."""
    return embedded * torch.tensor(factor).to(embedded)


def _cap(softcap: float, _: Any, __: Any, output: tuple[torch.Tensor, Any]) -> Any:
    """Bound logits, the first part of an output, by a softcap."""
    logits, *rest = output
    return torch.tanh(logits / softcap) * softcap, *rest

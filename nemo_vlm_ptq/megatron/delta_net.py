"""Gated DeltaNet, in place of the attention of a layer: transformers' module on every tensor rank.

megatron-core's own needs CUDA and flash-linear-attention. transformers takes the kernels of
flash-linear-attention where they are installed, and torch otherwise.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.initialization import no_init_weights
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from nemo_vlm_ptq.families.decoder import DeltaNet
from nemo_vlm_ptq.families.delta_net import KEPT


def keep_float32(model: Any) -> None:
    """Store what DeltaNets compute with in float32 in that dtype, whatever the model's dtype."""
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            for name in KEPT:
                parameter = module.get_parameter(name)
                parameter.data = parameter.data.float()


class GatedDeltaNet(Qwen3_5GatedDeltaNet):
    """Gated DeltaNet with the call of megatron-core's self-attention.

    Legend: S tokens, B samples, H hidden size.
    """

    def __init__(self, config: Any, delta_net: DeltaNet, **_: Any) -> None:
        sizes: Any = SimpleNamespace(
            hidden_size=config.hidden_size,
            linear_num_value_heads=delta_net.value_heads,
            linear_num_key_heads=delta_net.key_heads,
            linear_key_head_dim=delta_net.key_dim,
            linear_value_head_dim=delta_net.value_dim,
            linear_conv_kernel_dim=delta_net.kernel,
            hidden_act="silu",
            rms_norm_eps=config.layernorm_epsilon,
            layer_types=["linear_attention"],
        )
        with no_init_weights():  # random initialization takes seconds
            super().__init__(sizes, 0)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Map hidden states [S,B,H] to [S,B,H], and no bias.

        Tokens that the last one does not attend to are left out, as transformers leaves padding
        out. Padding at the end changes nothing in front of it.
        """
        states_BSH = hidden_states.transpose(0, 1)
        if attention_mask is not None:  # [B,1,S,S], True where masked out
            states_BSH = states_BSH * ~attention_mask[:, 0, -1, :, None]
        return super().forward(states_BSH).transpose(0, 1).contiguous(), None

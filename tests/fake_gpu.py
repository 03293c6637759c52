"""Meta tensors as a substitute for GPU tensors: torch rejects mixing them with CPU tensors."""

import torch

from nemo_vlm_ptq.reference import checkpoint
from nemo_vlm_ptq.reference.model import FakeQuantizedLinear
from nemo_vlm_ptq.verify.tensors import half_step_excess

DEVICE = torch.device("meta")


def check_linears_on_device(linears, monkeypatch):
    """Check that CPU linears dequantize, compare and compute on DEVICE."""
    monkeypatch.setattr(checkpoint, "to_device", lambda tensor, device: tensor.to(device))
    assert linears
    for name, linear in linears.items():
        values = linear.dequantize(DEVICE)
        assert values.weight.shape == linear.dequantize().weight.shape
        excess = half_step_excess(torch.empty_like(values.weight), linear, values)
        module = FakeQuantizedLinear(linear, torch.float32, DEVICE)
        output = module(torch.empty(3, values.weight.shape[1], device=DEVICE))
        scales = [
            scale for scale in (module.pre_quant_scale, module.input_scale) if scale is not None
        ]
        tensors = (values.weight, values.step, excess, output, module.weight, *scales)
        for tensor in (*tensors, *module.low_rank):
            assert tensor.device == DEVICE, name

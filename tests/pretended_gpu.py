"""Tensors without values in place of a GPU's: torch refuses to mix them with the host's."""

import torch

from nemo_vlm_ptq.reference import checkpoint
from nemo_vlm_ptq.reference.model import SimulatedLinear
from nemo_vlm_ptq.verify.tensors import half_step_excess

DEVICE = torch.device("meta")


def check_linears_on_it(linears, monkeypatch):
    """Weights, their distance from a source, and outputs of linears that lie on the host."""
    monkeypatch.setattr(checkpoint, "moved", lambda tensor, device: tensor.to(device))
    assert linears
    for name, linear in linears.items():
        values = linear.values(DEVICE)
        assert values.weight.shape == linear.values().weight.shape
        excess = half_step_excess(torch.empty_like(values.weight), linear, values)
        served = SimulatedLinear(linear, torch.float32, DEVICE)
        out = served(torch.empty(3, values.weight.shape[1], device=DEVICE))
        own = [
            served.weight,
            *(one for one in (served.pre_quant_scale, served.scale) if one is not None),
        ]
        for one in (values.weight, values.step, excess, out, *own, *served.branch):
            assert one.device == DEVICE, name

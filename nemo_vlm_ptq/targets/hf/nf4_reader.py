"""Reading NF4 linears as bitsandbytes serializes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.reference.checkpoint import Codes, Dequantized, ReadLinear
from nemo_vlm_ptq.reference.number_formats import NF4, NF4_BLOCK, unpack_nf4

NESTED_BLOCK = 256
STATE = "quant_state.bitsandbytes__nf4"
SUFFIXES = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", STATE)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FIXED = {
    "quant_type": "nf4",
    "blocksize": NF4_BLOCK,
    "nested_blocksize": NESTED_BLOCK,
    "nested_dtype": "float32",
}


def take_linears(tensors: dict[str, torch.Tensor]) -> dict[str, ReadLinear]:
    """Linears by name without `.weight`; their tensors leave `tensors`.

    Weights are rounded to the dtype in which bitsandbytes multiplies with them.

    Raises:
        ProofError: a tensor of a linear is missing, or is not what bitsandbytes can read.
    """
    ending = ".weight.absmax"
    names = sorted(name.removesuffix(ending) for name in tensors if name.endswith(ending))
    return {name: _take_linear(tensors, name) for name in names}


def _take_linear(tensors: dict[str, torch.Tensor], name: str) -> ReadLinear:
    parts = {}
    for suffix in ("", *(f".{suffix}" for suffix in SUFFIXES)):
        if f"{name}.weight{suffix}" not in tensors:
            raise VerificationError(f"{name}.weight{suffix} is missing")
        parts[suffix.removeprefix(".")] = tensors.pop(f"{name}.weight{suffix}")
    try:
        state = json.loads(bytes(parts[STATE].tolist()))
    except ValueError as error:
        raise VerificationError(f"{name}: {STATE} is no JSON: {error}") from None
    for key, value in FIXED.items():
        if state.get(key) != value:
            raise VerificationError(f"{name}: {key} is {state.get(key)!r}, not {value!r}")
    if not torch.equal(parts["quant_map"], torch.tensor(NF4)):
        raise VerificationError(f"{name}: quant_map holds other values than NF4's")
    if state.get("dtype") not in DTYPES:
        raise VerificationError(f"{name}: dtype {state.get('dtype')!r} is not known")
    for key in ("", "absmax"):
        if parts[key].dtype != torch.uint8:
            raise VerificationError(
                f"{name}: {key or 'weight'} is {parts[key].dtype}, not torch.uint8"
            )
    return ReadLinear(parts, partial(_values, state), "nf4")


def _values(state: Mapping[str, Any], parts: Codes) -> Dequantized:
    codes, table = parts["absmax"].int(), parts["nested_quant_map"].float()
    nested = parts["nested_absmax"].float().repeat_interleave(NESTED_BLOCK)[: len(codes)]
    absmax = table[codes] * nested + state["nested_offset"]
    values = unpack_nf4(parts[""]).unflatten(0, (-1, NF4_BLOCK)) * absmax[:, None]
    gaps = table.diff()
    wider = torch.maximum(gaps[(codes - 1).clamp(min=0)], gaps[codes.clamp(max=len(gaps) - 1)])
    step, off = (
        per_block.reshape(state["shape"][0], -1).repeat_interleave(NF4_BLOCK, dim=1)
        for per_block in (absmax, wider * nested / 2)
    )
    weight = values.reshape(state["shape"]).to(DTYPES[state["dtype"]]).float()
    return Dequantized(weight, step, step_error=off)

"""Read NF4 linears as bitsandbytes serializes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.reference.checkpoint import Dequantized, ReadLinear, StoredTensors
from nemo_vlm_ptq.reference.number_formats import NF4_BLOCK, NF4_VALUES, unpack_nf4

NESTED_BLOCK = 256
QUANT_STATE = "quant_state.bitsandbytes__nf4"
SUFFIXES = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", QUANT_STATE)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EXPECTED_STATE = {
    "quant_type": "nf4",
    "blocksize": NF4_BLOCK,
    "nested_blocksize": NESTED_BLOCK,
    "nested_dtype": "float32",
}


def pop_linears(tensors: dict[str, torch.Tensor]) -> dict[str, ReadLinear]:
    """Read all NF4 linears by name without `.weight`, and remove their tensors from `tensors`.

    Dequantized weights are rounded to the dtype in which bitsandbytes multiplies with them.

    Raises:
        VerificationError: a tensor of a linear is missing, or bitsandbytes could not read it.
    """
    suffix = ".weight.absmax"
    names = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    return {name: _pop_linear(tensors, name) for name in names}


def _pop_linear(tensors: dict[str, torch.Tensor], name: str) -> ReadLinear:
    stored = {}
    for suffix in ("", *(f".{suffix}" for suffix in SUFFIXES)):
        if f"{name}.weight{suffix}" not in tensors:
            raise VerificationError(f"tensor {name}.weight{suffix} is missing")
        stored[suffix.removeprefix(".")] = tensors.pop(f"{name}.weight{suffix}")
    try:
        state = json.loads(bytes(stored[QUANT_STATE].tolist()))
    except ValueError as error:
        raise VerificationError(f"{name}: {QUANT_STATE} must be JSON: {error}") from None
    for key, value in EXPECTED_STATE.items():
        if state.get(key) != value:
            raise VerificationError(f"{name}: {key} must be {value!r}, got {state.get(key)!r}")
    if not torch.equal(stored["quant_map"], torch.tensor(NF4_VALUES)):
        raise VerificationError(f"{name}: quant_map must hold the 16 values of NF4")
    if state.get("dtype") not in DTYPES:
        raise VerificationError(
            f"{name}: unknown dtype {state.get('dtype')!r}; supported: {', '.join(DTYPES)}"
        )
    for key in ("", "absmax"):
        if stored[key].dtype != torch.uint8:
            raise VerificationError(
                f"{name}: {key or 'weight'} must be torch.uint8, got {stored[key].dtype}"
            )
    return ReadLinear(stored=stored, decode=partial(_decode, state), number_format="nf4")


def _decode(state: Mapping[str, Any], stored: StoredTensors) -> Dequantized:
    """Dequantize a weight; a block's step error is half the gap between quantized absmax values."""
    codes, table = stored["absmax"].int(), stored["nested_quant_map"].float()
    nested = stored["nested_absmax"].float().repeat_interleave(NESTED_BLOCK)[: len(codes)]
    absmax = table[codes] * nested + state["nested_offset"]
    values = unpack_nf4(stored[""]).unflatten(0, (-1, NF4_BLOCK)) * absmax[:, None]
    gaps = table.diff()
    wider = torch.maximum(gaps[(codes - 1).clamp(min=0)], gaps[codes.clamp(max=len(gaps) - 1)])
    step, step_error = (
        per_block.reshape(state["shape"][0], -1).repeat_interleave(NF4_BLOCK, dim=1)
        for per_block in (absmax, wider * nested / 2)
    )
    weight = values.reshape(state["shape"]).to(DTYPES[state["dtype"]]).float()
    return Dequantized(weight=weight, step=step, step_error=step_error)

"""What the tensors of a TensorRT-LLM checkpoint hold, as far as the files alone can tell.

Tensors are read one at a time, from all tensor ranks of a pipeline stage together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_vlm_ptq.checkpoints.huggingface import all_finite
from nemo_vlm_ptq.targets.trtllm.contract_tensors import ExpectedTensor
from nemo_vlm_ptq.utils.progress import progress_bar

VALUE_CHECKS = ("values", "ranks", "padding")
FP8_NAN = 0x7F  # without the sign bit

Problems = Iterator[tuple[int, str]]  # (tensor rank, what is wrong)


def check_stage(
    paths: Sequence[Path], slots: Mapping[str, ExpectedTensor], config: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Check -> findings, each with file and tensor, of one pipeline stage.

    Args:
        paths: its rank files in the order of the tensor ranks.
        slots: name -> slot of the tensors that all of them hold in the right shape and dtype.
        config: config.json, checked.
    """
    found: dict[str, list[str]] = {name: [] for name in VALUE_CHECKS}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for name in progress_bar("verify contract", "tensor", 0, sorted(slots)):
            tensors = [file.get_tensor(name) for file in files]
            for check, problems in _check_tensor(tensors, slots[name], config).items():
                found[check] += [f"{paths[t].name}: {name} {what}" for t, what in problems]
        for name in sorted(name for name in slots if name.endswith("k_cache_scaling_factor")):
            keys = [name.replace("k_cache", f"{part}_cache") for part in ("k", "v", "kv")]
            own = [float(files[0].get_tensor(key)) for key in keys if key in slots]
            if len(own) < len(keys) or own[2] != max(own[:2]):
                found["values"].append(
                    f"{paths[0].name}: {keys[2]} must be the larger one of keys and of values"
                )
    return found


def _check_tensor(
    tensors: Sequence[torch.Tensor], slot: ExpectedTensor, config: Mapping[str, Any]
) -> dict[str, Iterable[tuple[int, str]]]:
    """Check -> problems of one tensor, as each tensor rank has it."""
    kv_heads = config["num_key_value_heads"]
    found: dict[str, Iterable[tuple[int, str]]] = {"values": _check_values(tensors, slot)}
    found["ranks"] = _check_ranks(tensors, slot)
    if slot.heads and len(tensors) > kv_heads:
        queries = config["num_attention_heads"] // len(tensors)
        found["ranks"] = [*found["ranks"], *_check_copies(tensors, queries, kv_heads)]
    if slot.kind == "vocab":
        found["padding"] = _check_padding(tensors, config["vocab_size"])
    return found


def _check_values(tensors: Sequence[torch.Tensor], slot: ExpectedTensor) -> Problems:
    """NaN, Inf, scales that are none, and weights that nobody wrote."""
    for t, tensor in enumerate(tensors):
        if tensor.dtype == torch.float8_e4m3fn:
            if bool(((_bytes(tensor) & FP8_NAN) == FP8_NAN).any()):
                yield t, "holds NaN"
                continue
            tensor = tensor.float() if slot.kind == "scale" else tensor
        elif tensor.is_floating_point() and not all_finite(tensor):
            yield t, "holds NaN or Inf"
            continue
        if slot.kind == "scale" and float(tensor.amin()) <= 0:
            yield t, f"holds the scale {float(tensor.amin()):g}, every scale must be above 0"
        if slot.kind == "weight" and not bool(_bytes(tensor).any()):
            yield t, "holds nothing but zeros"


def _check_ranks(tensors: Sequence[torch.Tensor], slot: ExpectedTensor) -> Problems:
    """All ranks hold the same where nothing is cut, and no two the same weights where it is."""
    for t, tensor in enumerate(tensors[1:], 1):
        if not slot.cut and not torch.equal(_bytes(tensor), _bytes(tensors[0])):
            yield t, "differs from that of the first tensor rank, all must hold the same"
        if (
            slot.cut
            and slot.kind == "weight"
            and torch.equal(_bytes(tensor), _bytes(tensors[t - 1]))
        ):
            yield t, "is that of the tensor rank before, each must hold its own share"


def _check_copies(tensors: Sequence[torch.Tensor], queries: int, kv_heads: int) -> Problems:
    """Ranks that share a KV head hold the same rows of k and v, which lie below their queries."""
    copies = len(tensors) // kv_heads
    start = len(tensors[0]) * queries // (queries + 2)
    for t, tensor in enumerate(tensors):
        first = t - t % copies
        if not torch.equal(_bytes(tensor[start:]), _bytes(tensors[first][start:])):
            yield t, f"has another KV head than tensor rank {first}, {copies} ranks share one"


def _check_padding(tensors: Sequence[torch.Tensor], vocab: int) -> Problems:
    """Rows after the vocabulary are zeros; they lie in the last ranks."""
    for t, tensor in enumerate(tensors):
        own = max(0, vocab - t * len(tensor))
        if bool(tensor[own:].any()):
            yield t, f"must hold zeros from row {own} on, where the vocabulary of {vocab} ends"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, its first axis kept; NaNs compare equal like any others."""
    return (tensor.reshape(1) if tensor.dim() == 0 else tensor).view(torch.uint8)

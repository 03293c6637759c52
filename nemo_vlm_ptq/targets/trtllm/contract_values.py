"""Check the values of a TensorRT-LLM checkpoint, as far as its files alone allow.

Tensors are read one at a time, from all tensor-parallel ranks of a pipeline stage, to bound memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
LEAST_BLOCK_SCALE = 2.0**-9  # of nvfp4; values far below those of the tensor become zeros

Problems = Iterator[tuple[int, str]]  # (tensor-parallel rank, message)


def check_pipeline_stage(
    paths: Sequence[Path], expected: Mapping[str, ExpectedTensor], config: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Check the values of one pipeline stage.

    Args:
        paths: rank files of the stage, in tensor-parallel order.
        expected: tensors that all rank files hold in the expected shape and dtype.
        config: contents of config.json, already checked.

    Returns:
        Findings by name of the check, each with file and tensor.
    """
    found: dict[str, list[str]] = {name: [] for name in VALUE_CHECKS}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for name in progress_bar("verify contract", "tensor", 0, sorted(expected)):
            shards = [file.get_tensor(name) for file in files]
            problems = _check_tensor(shards, expected[name], config)
            scale = name.removesuffix("weight") + "weights_scaling_factor"
            if expected[name].role == "weight" and scale in expected:
                scales = [file.get_tensor(scale) for file in files]
                problems.append(("values", _check_zeros(shards, scales)))
            for check, messages in problems:
                found[check] += [f"{paths[t].name}: {name} {message}" for t, message in messages]
        for name in sorted(name for name in expected if name.endswith("k_cache_scaling_factor")):
            names = [name.replace("k_cache", f"{part}_cache") for part in ("k", "v", "kv")]
            scales = [float(files[0].get_tensor(key)) for key in names if key in expected]
            if len(scales) < len(names) or scales[2] != max(scales[:2]):
                found["values"].append(
                    f"{paths[0].name}: {names[2]} must be the larger of the key and value scales"
                )
    return found


def _check_tensor(
    shards: Sequence[torch.Tensor], expected: ExpectedTensor, config: Mapping[str, Any]
) -> list[tuple[str, Problems]]:
    """Check one tensor; `shards` are its shards or replicas in tensor-parallel order."""
    kv_heads = config["num_key_value_heads"]
    found = [("values", _check_values(shards, expected)), ("ranks", _check_ranks(shards, expected))]
    if expected.fused_qkv and len(shards) > kv_heads:
        queries = config["num_attention_heads"] // len(shards)
        found.append(("ranks", _check_kv_replicas(shards, queries, kv_heads)))
    if expected.role == "vocab":
        found.append(("padding", _check_padding(shards, config["vocab_size"])))
    return found


def _check_values(shards: Sequence[torch.Tensor], expected: ExpectedTensor) -> Problems:
    """Find NaN, Inf, and scales that are not positive."""
    for t, tensor in enumerate(shards):
        if tensor.dtype == torch.float8_e4m3fn:
            if bool(((_bytes(tensor) & FP8_NAN) == FP8_NAN).any()):
                yield t, "must be finite, got NaN"
                continue
            tensor = tensor.float() if expected.role == "scale" else tensor
        elif tensor.is_floating_point() and not all_finite(tensor):
            yield t, "must be finite, got NaN or Inf"
            continue
        if expected.role == "scale" and float(tensor.amin()) <= 0:
            yield t, f"must hold positive scales, got {float(tensor.amin()):g}"


def _check_zeros(shards: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> Problems:
    """Find weights of zeros whose scales are those of other weights; pruned ones are right."""
    for t, (shard, scale) in enumerate(zip(shards, scales, strict=True)):
        if bool(_bytes(shard).any()):
            continue
        values = scale.float().unique()
        if int((values > LEAST_BLOCK_SCALE).sum()) > 1:
            yield t, "must hold a nonzero value, got only zeros with the scales of other values"


def _check_ranks(shards: Sequence[torch.Tensor], expected: ExpectedTensor) -> Problems:
    """Find replicas that differ, and weight shards that equal the previous rank's."""
    for t, tensor in enumerate(shards[1:], 1):
        if not expected.sharded and not torch.equal(_bytes(tensor), _bytes(shards[0])):
            yield t, "is replicated and must equal that of the first tensor-parallel rank"
        if (
            expected.sharded
            and expected.role == "weight"
            and bool(_bytes(tensor).any())
            and torch.equal(_bytes(tensor), _bytes(shards[t - 1]))
        ):
            yield t, "is sharded and must differ from that of the previous tensor-parallel rank"


def _check_kv_replicas(shards: Sequence[torch.Tensor], queries: int, kv_heads: int) -> Problems:
    """Find k and v rows that differ between ranks of one KV head; they follow the q rows."""
    replicas = len(shards) // kv_heads
    start = len(shards[0]) * queries // (queries + 2)
    for t, tensor in enumerate(shards):
        first = t - t % replicas
        if not torch.equal(_bytes(tensor[start:]), _bytes(shards[first][start:])):
            yield (
                t,
                f"must hold the KV head of tensor-parallel rank {first}: "
                f"{replicas} ranks share each head",
            )


def _check_padding(shards: Sequence[torch.Tensor], vocab: int) -> Problems:
    """Find nonzero rows after the vocabulary, at the end of the last shards."""
    for t, tensor in enumerate(shards):
        rows = max(0, vocab - t * len(tensor))
        if bool(tensor[rows:].any()):
            yield t, f"must be zero from row {rows}, after the vocabulary of {vocab}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as uint8, keeping its first axis, so that NaN compares equal to itself."""
    return (tensor.reshape(1) if tensor.dim() == 0 else tensor).view(torch.uint8)

"""Read TensorRT-LLM checkpoints: unshard the rank files and rename to Hugging Face names.

All ranks' tensors stay memory-mapped; only what is concatenated is copied.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint, ReadLinear, read_kv_cache, read_linear

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan

# TensorRT-LLM module -> (Hugging Face module, sharded dimension)
ROW_PARALLEL = {"attention.dense": ("self_attn.o_proj", 1), "mlp.proj": ("mlp.down_proj", 1)}
SUFFIXES = {
    "weight": "weight",
    "weights_scaling_factor": "scale",
    "weights_scaling_factor_2": "scale_2",
    "activation_scaling_factor": "input_scale",
    "prequant_scaling_factor": "pre_quant_scale",
}
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
EMBEDDING = "transformer.vocab_embedding.weight"
NON_LAYER_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

RankTensors = dict[str, torch.Tensor]


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a TensorRT-LLM checkpoint."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise VerificationError(f"{folder}/config.json cannot be read: {error}") from None


def read_ranks(folder: Path, world_size: int) -> list[RankTensors]:
    """Read the tensors of every rank file, in rank order."""
    ranks = []
    for rank in range(world_size):
        path = folder / f"rank{rank}.safetensors"
        try:
            ranks.append(load_file(path))
        except Exception as error:  # safetensors raises its own exception types for damaged files
            raise VerificationError(f"{path} cannot be read: {error}") from None
    return ranks


def read_trtllm(folder: Path, prefix: str) -> ReadCheckpoint:
    """Read the decoder of a checkpoint, unsharded.

    Args:
        folder: with config.json and rank{r}.safetensors.
        prefix: of Hugging Face names, before `model.` and `lm_head.`.

    Raises:
        VerificationError: a file or tensor is missing, or a tensor contradicts config.json.
    """
    config = read_config(folder)
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    ranks = read_ranks(folder, tp * pp)
    block = config["quantization"]
    kv_algorithm, kv_scales = block["kv_cache_quant_algo"], []
    linears: dict[str, ReadLinear] = {}
    plain: dict[str, torch.Tensor] = {}
    layers_per_stage = config["num_hidden_layers"] // pp
    for layer in range(config["num_hidden_layers"]):
        stage, local = divmod(layer, layers_per_stage)
        tensor_ranks = ranks[stage * tp : (stage + 1) * tp]
        source = f"transformer.layers.{local}."
        target = f"{prefix}model.layers.{layer}."
        for name, norm in NORMS.items():
            plain[f"{target}{norm}.weight"] = _replicated(tensor_ranks, f"{source}{name}.weight")
        for name, tensors in _unshard_linears(tensor_ranks, source, target, config).items():
            if block["quant_algo"] is None:
                plain[f"{name}.weight"] = tensors["weight"]
            else:
                linears[name] = read_linear(tensors, block, name)
        if kv_algorithm is not None:
            name = f"{source}attention.kv_cache_scaling_factor"
            kv_scales.append(_replicated(tensor_ranks, name))
    for name, hf_name in NON_LAYER_TENSORS.items():
        stage = 0 if name == EMBEDDING else pp - 1
        tensor_ranks = ranks[stage * tp : (stage + 1) * tp]
        if hf_name == "model.norm.weight":
            plain[prefix + hf_name] = _replicated(tensor_ranks, name)
        else:
            padded = _concat([_get(rank, name) for rank in tensor_ranks])
            plain[prefix + hf_name] = padded[: config["vocab_size"]]
    kv = None if kv_algorithm is None else read_kv_cache(kv_algorithm, kv_scales, kv_scales)
    return ReadCheckpoint(linears=linears, plain=plain, kv=kv)


def _get(rank: RankTensors, name: str) -> torch.Tensor:
    if name not in rank:
        raise VerificationError(f"tensor {name} is missing")
    return rank[name]


def _replicated(ranks: list[RankTensors], name: str) -> torch.Tensor:
    first = _get(ranks[0], name)
    if not all(torch.equal(first, _get(rank, name)) for rank in ranks[1:]):
        raise VerificationError(f"tensor {name} differs between tensor-parallel ranks")
    return first


def _concat(shards: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Concatenate shards; a single shard is returned as it is, memory-mapped."""
    return torch.cat(shards, dim=dim) if shards[1:] else shards[0]


def _linear_tensors(rank: RankTensors, module: str) -> RankTensors:
    """Return one rank's tensors of a linear by the field names of the reference reader."""
    tensors = {
        key: rank[f"{module}.{suffix}"]
        for suffix, key in SUFFIXES.items()
        if f"{module}.{suffix}" in rank
    }
    if "weight" not in tensors:
        raise VerificationError(f"tensor {module}.weight is missing")
    return tensors


def _unshard(ranks: list[RankTensors], module: str, dim: int) -> RankTensors:
    """Unshard the tensors of one linear whose weight is sharded along outputs (0) or inputs (1)."""
    shards = [_linear_tensors(rank, module) for rank in ranks]
    unsharded = {}
    for key, first in shards[0].items():
        parts = [shard[key] for shard in shards if key in shard]
        if len(parts) != len(shards):
            raise VerificationError(f"{module}: tensor {key} is missing on a tensor-parallel rank")
        is_sharded = (key == "pre_quant_scale" and dim == 1) or (
            key in ("weight", "scale") and first.dim() > dim and first.numel() > 1
        )
        if is_sharded:
            unsharded[key] = _concat(parts, 0 if key == "pre_quant_scale" else dim)
        else:
            unsharded[key] = _replicated([{key: part} for part in parts], key)
    return unsharded


def _unshard_linears(
    ranks: list[RankTensors], source: str, target: str, config: dict[str, Any]
) -> dict[str, RankTensors]:
    """Return the unsharded tensors of a layer's linears by Hugging Face name."""
    linears = {hf: _unshard(ranks, source + name, dim) for name, (hf, dim) in ROW_PARALLEL.items()}
    q, k, v = _unshard_qkv(ranks, source + "attention.qkv", config)
    if config["architecture"] == "Phi3ForCausalLM":
        rows = config["intermediate_size"] // len(ranks)
        halves = [
            _split_rows(_linear_tensors(rank, f"{source}mlp.fc"), [rows] * 2) for rank in ranks
        ]
        up, gate = (_concat_rows([rank[index] for rank in halves]) for index in range(2))
        linears["self_attn.qkv_proj"] = _concat_rows([q, k, v])
        linears["mlp.gate_up_proj"] = _concat_rows([gate, up])
    else:
        linears |= {f"self_attn.{part}_proj": t for part, t in zip("qkv", (q, k, v), strict=True)}
        linears["mlp.gate_proj"] = _unshard(ranks, f"{source}mlp.fc", 0)
        linears["mlp.up_proj"] = _unshard(ranks, f"{source}mlp.gate", 0)
    return {target + name: tensors for name, tensors in linears.items()}


def _has_output_dim(key: str, tensor: torch.Tensor) -> bool:
    """Return whether dimension 0 runs over output features (two per row for packed int4)."""
    return key in ("weight", "scale") and tensor.dim() > 0 and tensor.shape[0] > 1


def _split_rows(fused: RankTensors, rows: list[int]) -> list[RankTensors]:
    """Split a fused linear into parts of `rows` output features; other tensors go to every part."""
    parts: list[RankTensors] = [{} for _ in rows]
    for key, tensor in fused.items():
        packed = key == "weight" and tensor.shape[0] * 2 == sum(rows)
        counts = [count // 2 for count in rows] if packed else rows
        split = tensor.split(counts) if _has_output_dim(key, tensor) else [tensor] * len(rows)
        for part, piece in zip(parts, split, strict=True):
            part[key] = piece
    return parts


def _concat_rows(parts: list[RankTensors]) -> RankTensors:
    """Concatenate linears along output features; other tensors must be equal in all parts."""
    return {
        key: _concat([part[key] for part in parts])
        if _has_output_dim(key, first)
        else _replicated([{key: part[key]} for part in parts], key)
        for key, first in parts[0].items()
    }


def _unshard_qkv(
    ranks: list[RankTensors], module: str, config: dict[str, Any]
) -> list[RankTensors]:
    """Unshard q, k and v from the fused [q|k|v] rows of each rank.

    KV heads fewer than tensor-parallel ranks are replicated; replicas must be equal.
    """
    tp, head_dim, kv_heads = (len(ranks), config["head_size"], config["num_key_value_heads"])
    local_q, local_kv = config["num_attention_heads"] // tp, max(1, kv_heads // tp)
    rows = [local_q * head_dim, local_kv * head_dim, local_kv * head_dim]
    replicas = max(1, tp // kv_heads)
    unsharded = []
    per_rank = [_split_rows(_linear_tensors(rank, module), rows) for rank in ranks]
    for index, part in enumerate("qkv"):
        shards = [parts[index] for parts in per_rank]
        if part != "q":
            for rank, shard in enumerate(shards):
                first = shards[rank - rank % replicas]
                if shard is not first and not all(torch.equal(shard[k], first[k]) for k in first):
                    raise VerificationError(
                        f"{module}: {part} of tensor-parallel rank {rank} differs from the replica "
                        f"on rank {rank - rank % replicas}"
                    )
            shards = shards[::replicas]
        unsharded.append(_concat_rows(shards))
    return unsharded


def read(folder: Path, plan: Plan) -> ReadCheckpoint:
    """Read an export of this package: llm/, and the vision tensors in vision/."""
    checkpoint = read_trtllm(folder / "llm", plan.family.decoder_prefix)
    vision = load_file(folder / "vision" / "model.safetensors")
    return replace(checkpoint, plain=checkpoint.plain | vision)

"""Reading a TensorRT-LLM checkpoint back: rank files merged into Hugging Face names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint, ReadLinear, dequantize, kv_cache

MODULES = {"attention.dense": ("self_attn.o_proj", 1), "mlp.proj": ("mlp.down_proj", 1)}
SUFFIXES = {
    "weight": "weight",
    "weights_scaling_factor": "scale",
    "weights_scaling_factor_2": "scale_2",
    "activation_scaling_factor": "input_scale",
    "prequant_scaling_factor": "pre_quant_scale",
}
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
ENDS = {
    "transformer.vocab_embedding.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a TensorRT-LLM checkpoint."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise VerificationError(f"{folder}/config.json cannot be read: {error}") from None


def read_ranks(folder: Path, world: int) -> list[dict[str, torch.Tensor]]:
    """Tensors of every rank file, in rank order."""
    ranks = []
    for rank in range(world):
        path = folder / f"rank{rank}.safetensors"
        try:
            ranks.append(load_file(path))
        except Exception as error:  # safetensors raises its own types for damage of any kind
            raise VerificationError(f"{path} cannot be read: {error}") from None
    return ranks


def read_trtllm(folder: Path, prefix: str) -> ReadCheckpoint:
    """The decoder of a checkpoint, whole, names with `prefix` before `model.` and `lm_head.`.

    Raises:
        ProofError: a file or tensor is missing or cannot be what config.json says.
    """
    config = read_config(folder)
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    ranks = read_ranks(folder, tp * pp)
    block = config["quantization"]
    kv_algorithm, kv_scales = block["kv_cache_quant_algo"], []
    linears: dict[str, ReadLinear] = {}
    plain: dict[str, torch.Tensor] = {}
    per_stage = config["num_hidden_layers"] // pp
    for layer in range(config["num_hidden_layers"]):
        stage, local = divmod(layer, per_stage)
        own = ranks[stage * tp : (stage + 1) * tp]
        source = f"transformer.layers.{local}."
        target = f"{prefix}model.layers.{layer}."
        for name, norm in NORMS.items():
            plain[f"{target}{norm}.weight"] = _replicated(own, f"{source}{name}.weight")
        for name, tensors in _modules(own, source, target, config).items():
            if block["quant_algo"] is None:
                plain[f"{name}.weight"] = tensors["weight"]
            else:
                linears[name] = dequantize(tensors, block, name)
        if kv_algorithm is not None:
            kv_scales.append(_replicated(own, f"{source}attention.kv_cache_scaling_factor"))
    for name, hf in ENDS.items():
        stage = 0 if name == "transformer.vocab_embedding.weight" else pp - 1
        own = ranks[stage * tp : (stage + 1) * tp]
        if hf == "model.norm.weight":
            plain[prefix + hf] = _replicated(own, name)
        else:
            whole = _joined([_get(rank, name) for rank in own])
            plain[prefix + hf] = whole[: config["vocab_size"]]
    kv = None if kv_algorithm is None else kv_cache(kv_algorithm, kv_scales, kv_scales)
    return ReadCheckpoint(linears, plain, kv)


def _get(rank: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in rank:
        raise VerificationError(f"tensor {name} is missing")
    return rank[name]


def _replicated(ranks: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    first = _get(ranks[0], name)
    if not all(torch.equal(first, _get(rank, name)) for rank in ranks[1:]):
        raise VerificationError(f"tensor {name} differs between tensor ranks")
    return first


def _joined(parts: list[torch.Tensor], axis: int = 0) -> torch.Tensor:
    """Parts in one; a single one as it is, over its mapped file."""
    return torch.cat(parts, dim=axis) if parts[1:] else parts[0]


def _shard(rank: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    found = {
        key: rank[f"{module}.{suffix}"]
        for suffix, key in SUFFIXES.items()
        if f"{module}.{suffix}" in rank
    }
    if "weight" not in found:
        raise VerificationError(f"tensor {module}.weight is missing")
    return found


def _merge(ranks: list[dict[str, torch.Tensor]], module: str, axis: int) -> dict[str, torch.Tensor]:
    """One module's whole tensors from its shards, cut along output (0) or input (1)."""
    shards = [_shard(rank, module) for rank in ranks]
    whole = {}
    for key, first in shards[0].items():
        parts = [shard[key] for shard in shards if key in shard]
        if len(parts) != len(shards):
            raise VerificationError(f"{module}: {key} is missing on a rank")
        cut = (key == "pre_quant_scale" and axis == 1) or (
            key in ("weight", "scale") and first.dim() > axis and first.numel() > 1
        )
        if cut:
            whole[key] = _joined(parts, 0 if key == "pre_quant_scale" else axis)
        else:
            whole[key] = _replicated([{key: part} for part in parts], key)
    return whole


def _modules(
    ranks: list[dict[str, torch.Tensor]], source: str, target: str, config: dict[str, Any]
) -> dict[str, dict[str, torch.Tensor]]:
    """Hugging Face linear -> its whole tensors, for one layer."""
    found = {hf: _merge(ranks, source + module, axis) for module, (hf, axis) in MODULES.items()}
    q, k, v = _split_qkv(ranks, source + "attention.qkv", config)
    if config["architecture"] == "Phi3ForCausalLM":
        half = config["intermediate_size"] // len(ranks)
        halves = [_cut_rows(_shard(rank, f"{source}mlp.fc"), [half, half]) for rank in ranks]
        up, gate = (_stack([rank[index] for rank in halves]) for index in range(2))
        found["self_attn.qkv_proj"] = _stack([q, k, v])
        found["mlp.gate_up_proj"] = _stack([gate, up])
    else:
        found |= {f"self_attn.{part}_proj": t for part, t in zip("qkv", (q, k, v), strict=True)}
        found["mlp.gate_proj"] = _merge(ranks, f"{source}mlp.fc", 0)
        found["mlp.up_proj"] = _merge(ranks, f"{source}mlp.gate", 0)
    return {target + name: tensors for name, tensors in found.items()}


def _by_rows(key: str, tensor: torch.Tensor) -> bool:
    """The tensor has a row, or half a byte's row, for each output."""
    return key in ("weight", "scale") and tensor.dim() > 0 and tensor.shape[0] > 1


def _cut_rows(shard: dict[str, torch.Tensor], rows: list[int]) -> list[dict[str, torch.Tensor]]:
    """The parts of a fused module that lie above each other; what has no rows they share."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in rows]
    for key, tensor in shard.items():
        packed = key == "weight" and tensor.shape[0] * 2 == sum(rows)
        counts = [count // 2 for count in rows] if packed else rows
        pieces = tensor.split(counts) if _by_rows(key, tensor) else [tensor] * len(rows)
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece
    return parts


def _stack(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Parts put above each other; what has no rows must be the same in all."""
    return {
        key: _joined([part[key] for part in parts])
        if _by_rows(key, first)
        else _replicated([{key: part[key]} for part in parts], key)
        for key, first in parts[0].items()
    }


def _split_qkv(
    ranks: list[dict[str, torch.Tensor]], module: str, config: dict[str, Any]
) -> list[dict[str, torch.Tensor]]:
    """q, k and v, whole, from each rank's [q|k|v] rows; repeated KV heads are taken once."""
    tp, dim, kv = len(ranks), config["head_size"], config["num_key_value_heads"]
    own_q, own_kv = config["num_attention_heads"] // tp, max(1, kv // tp)
    rows = [own_q * dim, own_kv * dim, own_kv * dim]
    copies = max(1, tp // kv)
    whole = []
    cut = [_cut_rows(_shard(rank, module), rows) for rank in ranks]
    for index, part in enumerate("qkv"):
        shards = [rank[index] for rank in cut]
        if part != "q":
            for rank, shard in enumerate(shards):
                first = shards[rank - rank % copies]
                if shard is not first and not all(torch.equal(shard[k], first[k]) for k in first):
                    raise VerificationError(f"{module}: copies of a {part} head differ")
            shards = shards[::copies]
        whole.append(_stack(shards))
    return whole

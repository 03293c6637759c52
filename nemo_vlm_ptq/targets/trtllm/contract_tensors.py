"""Derive from config.json the tensors that each rank file of a TensorRT-LLM checkpoint must hold.

Names, shapes and dtypes are those of TensorRT-LLM 1.2's modules (layers/attention, layers/mlp,
quantization/layers). Layers are numbered from 0 within a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from nemo_vlm_ptq.targets.trtllm.contract_config import get_quantization

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # torch -> safetensors
NVFP4_BLOCK = 16  # inputs that share a scale
ROW_PARALLEL = ("attention.dense", "mlp.proj")  # sharded along input features
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"


@dataclass(frozen=True)
class ExpectedTensor:
    """Tensor of a rank file.

    shape: on each rank.
    dtype: as safetensors names it.
    role: what the values are: a scale, a weight, a tensor with vocabulary rows, or other.
    sharded: whether tensor-parallel ranks hold different shards; otherwise replicas.
    fused_qkv: whether its rows are q, k and v.
    optional: whether it may be absent.
    """

    shape: tuple[int, ...]
    dtype: str
    role: Literal["plain", "weight", "scale", "vocab"]
    sharded: bool = False
    fused_qkv: bool = False
    optional: bool = False


def expected_tensors(config: Mapping[str, Any], rank: int) -> dict[str, ExpectedTensor]:
    """Return the expected tensors of one rank file by name; `config` must have been checked."""
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    hidden, dtype = config["hidden_size"], DTYPES[config["dtype"]]
    norm = ExpectedTensor(shape=(hidden,), dtype=dtype, role="plain")
    expected: dict[str, ExpectedTensor] = {}
    for layer in range(config["num_hidden_layers"] // pp):
        prefix = f"transformer.layers.{layer}."
        expected |= {f"{prefix}{name}.weight": norm for name in ("input_layernorm",
                                                                 "post_layernorm")}  # fmt: skip
        expected |= {prefix + name: tensor for name, tensor in _kv_scales(config).items()}
        for module, shape in _linear_shapes(config).items():
            for suffix, tensor in _linear_tensors(config, prefix + module, shape).items():
                expected[f"{prefix}{module}.{suffix}"] = tensor
    if rank // tp == 0:
        expected[EMBEDDING] = _embedding(config)
    if rank // tp == pp - 1:
        expected["transformer.ln_f.weight"] = norm
        shape = (-(-config["vocab_size"] // tp), hidden)
        shared = bool(config.get("share_embedding_table")) and pp == 1
        tied = shared and expected[EMBEDDING].shape == shape
        expected[HEAD] = ExpectedTensor(
            shape=shape, dtype=dtype, role="vocab", sharded=tp > 1, optional=tied
        )
    return expected


def _embedding(config: Mapping[str, Any]) -> ExpectedTensor:
    """Return the embedding: replicated, or sharded along the padded vocabulary or the features."""
    tp, hidden, vocab = config["mapping"]["tp_size"], config["hidden_size"], config["vocab_size"]
    dtype, sharded = DTYPES[config["dtype"]], tp > 1
    if not config["use_parallel_embedding"]:
        return ExpectedTensor(shape=(vocab, hidden), dtype=dtype, role="plain")
    if config["embedding_sharding_dim"] == 1:
        shape = (vocab, hidden // tp)
        return ExpectedTensor(shape=shape, dtype=dtype, role="plain", sharded=sharded)
    shape = (-(-vocab // tp), hidden)
    return ExpectedTensor(shape=shape, dtype=dtype, role="vocab", sharded=sharded)


def _kv_scales(config: Mapping[str, Any]) -> dict[str, ExpectedTensor]:
    """Return the KV cache scales of a layer: a common one, and optional ones of keys and values."""
    if get_quantization(config).get("kv_cache_quant_algo") is None:
        return {}
    scale = ExpectedTensor(shape=(1,), dtype="F32", role="scale")
    name = "attention.{}_cache_scaling_factor"
    separate = {name.format(part): replace(scale, optional=True) for part in "kv"}
    return {name.format("kv"): scale} | separate


def _linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return output and input features of each linear module on a rank."""
    tp, head_size, hidden = config["mapping"]["tp_size"], config["head_size"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"] // tp, -(-config["num_key_value_heads"] // tp)
    ffn = config["intermediate_size"] // tp
    shapes = {
        "attention.qkv": ((heads + 2 * kv_heads) * head_size, hidden),
        "attention.dense": (hidden, heads * head_size),
        "mlp.fc": (ffn, hidden),
        "mlp.gate": (ffn, hidden),
        "mlp.proj": (hidden, ffn),
    }
    if config["architecture"] == "Phi3ForCausalLM":  # fused: this rank's rows of up, then of gate
        shapes["mlp.fc"] = (2 * ffn, hidden)
        del shapes["mlp.gate"]
    return shapes


def _linear_tensors(
    config: Mapping[str, Any], module: str, shape: tuple[int, int]
) -> dict[str, ExpectedTensor]:
    """Return the expected tensors of one linear module by suffix."""
    block, dtype = get_quantization(config), DTYPES[config["dtype"]]
    algorithm, excluded = block.get("quant_algo"), block.get("exclude_modules") or ()
    if any(fnmatchcase(module, pattern) for pattern in excluded):
        algorithm = None
    sharded, qkv = config["mapping"]["tp_size"] > 1, module.endswith("attention.qkv")
    row_parallel = sharded and module.endswith(ROW_PARALLEL)
    column_parallel = sharded and not row_parallel
    rows, columns = shape
    weight = ExpectedTensor(shape=shape, dtype=dtype, role="weight", sharded=sharded, fused_qkv=qkv)
    per_tensor = ExpectedTensor(shape=(1,), dtype="F32", role="scale")
    pre_quant_scale = ExpectedTensor(
        shape=(columns,), dtype=dtype, role="scale", sharded=row_parallel
    )
    if algorithm is None:
        return {"weight": weight}
    if algorithm == "FP8":
        return {
            "weight": replace(weight, dtype="F8_E4M3"),
            "weights_scaling_factor": per_tensor,
            "activation_scaling_factor": per_tensor,
        }
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return {
            "weight": replace(weight, dtype="I8"),
            "weights_scaling_factor": ExpectedTensor(
                shape=(rows,), dtype="F32", role="scale", sharded=column_parallel, fused_qkv=qkv
            ),
            "activation_scaling_factor": per_tensor,
            "prequant_scaling_factor": pre_quant_scale,
        }
    group_size = NVFP4_BLOCK if algorithm == "NVFP4" else block["group_size"]
    per_group = ExpectedTensor(
        shape=(rows, columns // group_size),
        dtype="F32",
        role="scale",
        sharded=sharded,
        fused_qkv=qkv,
    )
    if algorithm == "NVFP4":  # a byte holds two columns
        return {
            "weight": replace(weight, shape=(rows, columns // 2), dtype="U8"),
            "weights_scaling_factor": replace(per_group, dtype="F8_E4M3"),
            "weights_scaling_factor_2": per_tensor,
            "activation_scaling_factor": per_tensor,
        }
    tensors = {  # a byte holds two rows
        "weight": replace(weight, shape=(rows // 2, columns), dtype="I8"),
        "weights_scaling_factor": per_group,
        "prequant_scaling_factor": pre_quant_scale,
    }
    if algorithm == "W4A8_AWQ":
        tensors |= {
            "weights_scaling_factor_2": per_tensor,
            "activation_scaling_factor": per_tensor,
        }
    return tensors

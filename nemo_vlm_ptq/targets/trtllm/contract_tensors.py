"""The tensors of one rank's file of a TensorRT-LLM checkpoint, worked out from its config.json.

Names, shapes and dtypes are those of TensorRT-LLM 1.2's modules (layers/attention, layers/mlp,
quantization/layers). Layers are counted from 0 within a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from nemo_vlm_ptq.targets.trtllm.contract_config import quantization_of

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
BLOCK = 16  # inputs that share a scale in NVFP4
ROW_PARALLEL = ("attention.dense", "mlp.proj")  # tensor ranks cut their inputs
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a rank's file has to hold.

    cut: tensor ranks hold different parts of it, otherwise all the same; heads: its rows are
    q|k|v; optional: may be left out.
    """

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    kind: Literal["plain", "weight", "scale", "vocab"]
    cut: bool = False
    heads: bool = False
    optional: bool = False


def expected_tensors(config: Mapping[str, Any], rank: int) -> dict[str, ExpectedTensor]:
    """Name -> slot of one rank's file; `config` has passed its check."""
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    hidden, dtype = config["hidden_size"], DTYPES[config["dtype"]]
    norm = ExpectedTensor((hidden,), dtype, "plain")
    expected: dict[str, ExpectedTensor] = {}
    for layer in range(config["num_hidden_layers"] // pp):
        prefix = f"transformer.layers.{layer}."
        expected |= {f"{prefix}{name}.weight": norm for name in ("input_layernorm",
                                                                 "post_layernorm")}  # fmt: skip
        expected |= {prefix + name: slot for name, slot in _kv_scales(config).items()}
        for module, size in _linears(config).items():
            for suffix, slot in _linear(config, prefix + module, size).items():
                expected[f"{prefix}{module}.{suffix}"] = slot
    if rank // tp == 0:
        expected[EMBEDDING] = _embedding(config)
    if rank // tp == pp - 1:
        expected["transformer.ln_f.weight"] = norm
        shape = (-(-config["vocab_size"] // tp), hidden)
        shared = bool(config.get("share_embedding_table")) and pp == 1
        tied = shared and expected[EMBEDDING].shape == shape
        expected[HEAD] = ExpectedTensor(shape, dtype, "vocab", cut=tp > 1, optional=tied)
    return expected


def _embedding(config: Mapping[str, Any]) -> ExpectedTensor:
    """Whole, or cut over the vocabulary (padded to a multiple of the ranks), or over features."""
    tp, hidden, vocab = config["mapping"]["tp_size"], config["hidden_size"], config["vocab_size"]
    dtype = DTYPES[config["dtype"]]
    if not config["use_parallel_embedding"]:
        return ExpectedTensor((vocab, hidden), dtype, "plain")
    if config["embedding_sharding_dim"] == 1:
        return ExpectedTensor((vocab, hidden // tp), dtype, "plain", cut=tp > 1)
    return ExpectedTensor((-(-vocab // tp), hidden), dtype, "vocab", cut=tp > 1)


def _kv_scales(config: Mapping[str, Any]) -> dict[str, ExpectedTensor]:
    """Scales of a layer's KV cache: one for keys and values; they may have their own beside it."""
    if quantization_of(config).get("kv_cache_quant_algo") is None:
        return {}
    slot = ExpectedTensor((1,), "F32", "scale")
    name = "attention.{}_cache_scaling_factor"
    own = {name.format(part): replace(slot, optional=True) for part in "kv"}
    return {name.format("kv"): slot} | own


def _linears(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module -> outputs and inputs on a rank."""
    tp, dim, hidden = config["mapping"]["tp_size"], config["head_size"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"] // tp, -(-config["num_key_value_heads"] // tp)
    ffn = config["intermediate_size"] // tp
    linears = {
        "attention.qkv": ((heads + 2 * kv_heads) * dim, hidden),
        "attention.dense": (hidden, heads * dim),
        "mlp.fc": (ffn, hidden),
        "mlp.gate": (ffn, hidden),
        "mlp.proj": (hidden, ffn),
    }
    if config["architecture"] == "Phi3ForCausalLM":  # up above gate, both of this rank
        linears["mlp.fc"] = (2 * ffn, hidden)
        del linears["mlp.gate"]
    return linears


def _linear(
    config: Mapping[str, Any], module: str, size: tuple[int, int]
) -> dict[str, ExpectedTensor]:
    """Suffix -> slot of one module, quantized or left out of it."""
    block, dtype = quantization_of(config), DTYPES[config["dtype"]]
    algorithm, excluded = block.get("quant_algo"), block.get("exclude_modules") or ()
    if any(fnmatchcase(module, pattern) for pattern in excluded):
        algorithm = None
    several, qkv = config["mapping"]["tp_size"] > 1, module.endswith("attention.qkv")
    by_row = several and module.endswith(ROW_PARALLEL)
    by_column = several and not by_row
    out, columns = size
    weight = ExpectedTensor(size, dtype, "weight", cut=several, heads=qkv)
    one = ExpectedTensor((1,), "F32", "scale")
    pre_quant_scale = ExpectedTensor((columns,), dtype, "scale", cut=by_row)
    if algorithm is None:
        return {"weight": weight}
    if algorithm == "FP8":
        return {
            "weight": replace(weight, dtype="F8_E4M3"),
            "weights_scaling_factor": one,
            "activation_scaling_factor": one,
        }
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return {
            "weight": replace(weight, dtype="I8"),
            "weights_scaling_factor": ExpectedTensor(
                (out,), "F32", "scale", cut=by_column, heads=qkv
            ),
            "activation_scaling_factor": one,
            "prequant_scaling_factor": pre_quant_scale,
        }
    group = BLOCK if algorithm == "NVFP4" else block["group_size"]
    scale = ExpectedTensor((out, columns // group), "F32", "scale", cut=several, heads=qkv)
    if algorithm == "NVFP4":  # two columns a byte
        return {
            "weight": replace(weight, shape=(out, columns // 2), dtype="U8"),
            "weights_scaling_factor": replace(scale, dtype="F8_E4M3"),
            "weights_scaling_factor_2": one,
            "activation_scaling_factor": one,
        }
    found = {  # two rows a byte
        "weight": replace(weight, shape=(out // 2, columns), dtype="I8"),
        "weights_scaling_factor": scale,
        "prequant_scaling_factor": pre_quant_scale,
    }
    if algorithm == "W4A8_AWQ":
        found |= {"weights_scaling_factor_2": one, "activation_scaling_factor": one}
    return found

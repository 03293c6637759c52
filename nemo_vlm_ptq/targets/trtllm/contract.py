"""Check a TensorRT-LLM checkpoint against the contract of its loader, from its folder alone.

TensorRT-LLM only warns about a wrong dtype or an unexpected tensor. Here config.json, rank files,
names, shapes and dtypes must match exactly, and values are checked as far as possible without the
source model. Wrong values in tensors of the right shape (swapped rank shards, gate and up
exchanged, another model's weights) are not detected here; the stage `verify` has the source model
and finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.checkpoints.safetensors_header import read_safetensors_header
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.targets.checking import Check
from nemo_vlm_ptq.targets.trtllm.contract_config import check_config, get_quantization
from nemo_vlm_ptq.targets.trtllm.contract_tensors import ExpectedTensor, expected_tensors
from nemo_vlm_ptq.targets.trtllm.contract_values import VALUE_CHECKS, check_pipeline_stage

USUAL_LAYERS = 1000  # of which tensors are listed; more only if the files hold as many


def check_contract(folder: Path) -> list[str]:
    """Return all findings for a checkpoint folder, one line each; empty if it is correct."""
    return [finding for check in run_contract_checks(folder) for finding in check.findings]


def run_contract_checks(folder: Path) -> list[Check]:
    """Run all checks on a checkpoint folder; only the config check if config.json is wrong.

    Args:
        folder: with config.json and rank{r}.safetensors.
    """
    try:
        if not (folder / "config.json").is_file():
            raise UserError("it is no file")
        config = read_json_object(folder / "config.json")
    except (OSError, UserError) as error:
        finding = f"config.json cannot be read: {error}"
        return [Check(name="config", findings=[finding], about="")]
    if problems := check_config(config):
        return [Check(name="config", findings=problems, about="")]
    world_size, tp = config["mapping"]["world_size"], config["mapping"]["tp_size"]
    headers, files = _read_headers(folder, world_size)
    most = max((len(header) for header in headers.values()), default=0)
    layers = config["num_hidden_layers"]
    if layers > max(USUAL_LAYERS, most * config["mapping"]["pp_size"]):
        finding = f"config.json: num_hidden_layers is {layers}, a rank file holds {most} tensors"
        return [Check(name="config", findings=[finding], about="")]
    found: dict[str, list[str]] = {name: [] for name in ("names", "shapes", *VALUE_CHECKS)}
    for first in range(0, world_size, tp):  # first rank of a pipeline stage
        stage = {rank: headers[rank] for rank in range(first, first + tp) if rank in headers}
        expected = _without_absent_optional(expected_tensors(config, first), stage)
        for rank, header in stage.items():
            found["names"] += _check_names(header, expected, rank)
            found["shapes"] += _check_shapes(header, expected, rank)
        well_formed = {
            name: tensor
            for name, tensor in expected.items()
            if all(_matches(header.get(name), tensor) for header in stage.values())
        }
        if len(stage) == tp:  # values are compared across all tensor-parallel ranks
            paths = [folder / f"rank{rank}.safetensors" for rank in stage]
            for name, problems in check_pipeline_stage(paths, well_formed, config).items():
                found[name] += problems
    summaries = {
        "names": f"{sum(map(len, headers.values()))} tensors, none missing or unexpected",
        "shapes": "and dtypes as each rank loads them",
        "values": "finite, all scales positive",
        "ranks": "replicated tensors equal, shards distinct, KV heads replicated correctly",
        "padding": f"zero after a vocabulary of {config['vocab_size']}",
    }
    checks = [
        Check(name="config", findings=[], about=_describe(config)),
        Check(name="files", findings=files, about=f"one for each of {world_size} ranks"),
    ]
    return checks + [
        Check(name=name, findings=problems, about=summaries[name])
        for name, problems in found.items()
    ]


def _describe(config: Mapping[str, Any]) -> str:
    """Summarize a config.json, with the defaults that the loader fills in."""
    block, mapping = get_quantization(config), config["mapping"]
    algorithm, kv = (block.get(key) or "16 bit" for key in ("quant_algo", "kv_cache_quant_algo"))
    parts = [
        f"{config['architecture']}, {algorithm}, KV cache {kv}",
        f"TP {mapping['tp_size']} x PP {mapping['pp_size']}",
    ]
    if "rotary_base" not in config:
        parts.append("rotary_base is missing, the loader uses 10000")
    return ", ".join(parts)


def _read_headers(folder: Path, world_size: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Read the safetensors headers by rank; return them and the findings about the files."""
    names = [f"rank{rank}.safetensors" for rank in range(world_size)]
    headers, problems = {}, []
    for rank, name in enumerate(names):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            headers[rank] = read_safetensors_header(folder / name)
            with safe_open(folder / name, framework="pt"):  # validates more than the header
                pass
        except Exception as error:  # any damage of the file is a finding
            headers.pop(rank, None)
            problems.append(f"{name} cannot be read: {error}")
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    problems += [f"{name} is unexpected" for name in present if name not in names]
    return headers, problems


def _without_absent_optional(
    expected: Mapping[str, ExpectedTensor], headers: Mapping[int, Mapping[str, Any]]
) -> dict[str, ExpectedTensor]:
    """Drop the optional tensors that no tensor-parallel rank has."""
    return {
        name: tensor
        for name, tensor in expected.items()
        if not tensor.optional or any(name in header for header in headers.values())
    }


def _check_names(
    header: Mapping[str, Any], expected: Mapping[str, ExpectedTensor], rank: int
) -> list[str]:
    file = f"rank{rank}.safetensors"
    missing, unexpected = set(expected) - set(header), set(header) - set(expected)
    problems = [f"{file}: tensor {name} is missing" for name in sorted(missing)]
    return problems + [f"{file}: unexpected tensor {name}" for name in sorted(unexpected)]


def _check_shapes(
    header: Mapping[str, Any], expected: Mapping[str, ExpectedTensor], rank: int
) -> list[str]:
    problems = []
    for name in sorted(set(expected) & set(header)):
        tensor, found = expected[name], header[name]
        where = f"rank{rank}.safetensors: {name}"
        if _shape(found) != tensor.shape:
            problems.append(f"{where} must have shape {list(tensor.shape)}, got {found['shape']}")
        if found["dtype"] != tensor.dtype:
            problems.append(f"{where} must have dtype {tensor.dtype}, got {found['dtype']}")
    return problems


def _matches(found: Mapping[str, Any] | None, expected: ExpectedTensor) -> bool:
    """Return whether a header entry exists with the expected shape and dtype."""
    return found is not None and (_shape(found), found["dtype"]) == (expected.shape, expected.dtype)


def _shape(found: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape as the loader interprets it: [] equals [1]."""
    return tuple(found["shape"]) or (1,)

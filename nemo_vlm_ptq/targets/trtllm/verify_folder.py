"""Implement `verify DIR`: check any TensorRT-LLM checkpoint folder without a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nemo_vlm_ptq.checkpoints.huggingface import all_finite, read_json_object
from nemo_vlm_ptq.checkpoints.safetensors_header import read_safetensors_header
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.families import find_family
from nemo_vlm_ptq.parameter_map.entries import passthrough_names
from nemo_vlm_ptq.targets.checking import Check
from nemo_vlm_ptq.targets.trtllm.contract import run_contract_checks
from nemo_vlm_ptq.verify.files import check_files
from nemo_vlm_ptq.workdir.store import MANIFEST

MAX_PRINTED_FINDINGS = 10  # per check; --json prints all


def find_checkpoint(folder: Path) -> Path | None:
    """Return `folder` or its llm/, whichever holds a TensorRT-LLM checkpoint, damaged or not."""
    for candidate in (folder, folder / "llm"):
        has_ranks = any(candidate.glob("rank*.safetensors"))
        if has_ranks or _is_trtllm_config(candidate / "config.json"):
            return candidate
    return None


def verify_folder(folder: Path, *, as_json: bool) -> None:
    """Check a checkpoint and print one line per check, or all findings as JSON.

    Raises:
        UserError: the folder holds no TensorRT-LLM checkpoint.
        VerificationError: a check failed; the message gives the first finding.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise UserError(
            f"{folder} holds no TensorRT-LLM checkpoint: expected config.json with the key "
            "architecture, or rank0.safetensors, in it or in its llm/; verify other exports with "
            "`verify RECIPE`"
        )
    checks = [*run_contract_checks(checkpoint), *_check_beside(folder)]
    print(_format_json(checkpoint, checks) if as_json else _format_text(checks))
    failed = [check for check in checks if check.findings]
    if failed:
        count = sum(len(check.findings) for check in failed)
        total = f" ({count} findings)" if count > 1 else ""
        raise VerificationError(
            f"verify {checkpoint}: {failed[0].name}: {failed[0].findings[0]}{total}"
        )


def _check_beside(folder: Path) -> list[Check]:
    """Check what lies beside llm/: vision/, and the manifest of an export of this package."""
    checks = []
    if (folder / "vision").is_dir():
        findings = _check_vision(folder / "vision")
        about = "tower and projector as config.json describes them, finite"
        checks.append(Check(name="vision", findings=findings, about=about))
    if (folder / MANIFEST).is_file():
        findings = check_files(folder)
        about = "names and sha256 of every file as written"
        checks.append(Check(name="manifest", findings=findings, about=about))
    return checks


def _check_vision(folder: Path) -> list[str]:
    """Return the findings about the JSON files and tensors from which the engine is built."""
    findings = []
    for name in sorted({"config.json", *(path.name for path in folder.glob("*.json"))}):
        try:
            if not (folder / name).is_file():
                raise UserError("it is missing or no file")
            read_json_object(folder / name)  # rejects NaN and infinite numbers
        except (OSError, UserError) as error:
            findings.append(f"vision/{name} cannot be read: {error}")
    return findings or _check_vision_tensors(folder)


def _check_vision_tensors(folder: Path) -> list[str]:
    findings, path = [], folder / "model.safetensors"
    try:
        if not path.is_file():
            raise UserError("it is missing or no file")
        read_safetensors_header(path)
        with safe_open(path, framework="pt") as file:
            shapes = {}
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not tensor.is_floating_point() or not all_finite(tensor):
                    findings.append(f"vision/model.safetensors: {name} must hold finite numbers")
        if not shapes:
            findings.append("vision/model.safetensors holds no tensors")
        elif not findings:
            findings += _check_shapes(read_json_object(folder / "config.json"), shapes)
    except Exception as error:  # any damage of the file is a finding
        findings.append(f"vision/model.safetensors cannot be read: {error}")
    return findings


def _check_shapes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Compare tensors with the tower and projector of config.json, if the package knows them."""
    try:
        family = find_family(config)
    except UserError:
        return []
    towers = [one for key, one in config.items() if "vision" in key and isinstance(one, dict)]
    for layers in (tower.get("num_hidden_layers", 1) for tower in towers):
        if type(layers) is not int or not 0 < layers <= len(shapes):
            return [f"vision/config.json: num_hidden_layers is {layers!r} of {len(shapes)} tensors"]
    try:
        expected = family.vision_shapes(config)
    except Exception as error:  # transformers raises its own exception types
        return [f"vision/config.json describes no tower: {str(error).splitlines()[0]}"]
    extra = set(shapes) - set(expected) - set(passthrough_names(shapes, family.ignored_tensors))
    missing = sorted(set(expected) - set(shapes))
    findings = [f"vision/model.safetensors: {name} is missing" for name in missing]
    findings += [f"vision/model.safetensors: {name} is unexpected" for name in sorted(extra)]
    return findings + [
        f"vision/model.safetensors: {name} must have shape {list(shape)}, got {list(shapes[name])}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]


def _is_trtllm_config(path: Path) -> bool:
    """Return whether a config.json is TensorRT-LLM's; transformers' has `architectures`."""
    if not path.is_file():
        return False
    try:
        return "architecture" in read_json_object(path)
    except (OSError, UserError):
        return False


def _format_json(checkpoint: Path, checks: list[Check]) -> str:
    entries = [
        {"name": check.name, "passed": not check.findings, "findings": check.findings}
        for check in checks
    ]
    passed = all(entry["passed"] for entry in entries)
    return json.dumps({"folder": str(checkpoint), "passed": passed, "checks": entries}, indent=1)


def _format_text(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        count = len(check.findings)
        detail = f"{count} finding{'s' * (count > 1)}" if count else check.about
        lines.append(f"{check.name:8}{'FAILED' if count else 'passed'}  {detail}")
        lines += [f"  {finding}" for finding in check.findings[:MAX_PRINTED_FINDINGS]]
        if count > MAX_PRINTED_FINDINGS:
            lines.append(f"  and {count - MAX_PRINTED_FINDINGS} more; --json prints all")
    return "\n".join(lines)

"""`verify DIR`: a TensorRT-LLM checkpoint of anybody's checked by itself, without a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.targets.trtllm.contract import Check, contract_checks

SHOWN = 10  # findings of a check that are printed; --json gives all


def find_checkpoint(folder: Path) -> Path | None:
    """The folder itself, or its llm/, if a TensorRT-LLM checkpoint lies there, damaged or not."""
    for place in (folder, folder / "llm"):
        if any(place.glob("rank*.safetensors")) or _names_one(place / "config.json"):
            return place
    return None


def verify_folder(folder: Path, *, as_json: bool) -> None:
    """Check a checkpoint and print a line for each check.

    Raises:
        UserError: it is no TensorRT-LLM checkpoint.
        ProofError: something is wrong with it; tells the first finding.
    """
    place = find_checkpoint(folder)
    if place is None:
        raise UserError(
            f"{folder} holds no TensorRT-LLM checkpoint: it needs config.json with an "
            "architecture and rank0.safetensors, in itself or in llm/; other exports are verified "
            "by their recipe"
        )
    checks = contract_checks(place)
    print(_as_json(place, checks) if as_json else _as_text(checks))
    failed = [check for check in checks if check.findings]
    if failed:
        count = sum(len(check.findings) for check in failed)
        more = f" ({count} findings)" if count > 1 else ""
        raise VerificationError(f"verify {place}: {failed[0].name}: {failed[0].findings[0]}{more}")


def _names_one(path: Path) -> bool:
    """A config.json that TensorRT-LLM, and not transformers, would read."""
    try:
        return "architecture" in read_json_object(path)
    except (OSError, UserError):
        return False


def _as_json(place: Path, checks: list[Check]) -> str:
    entries = [
        {"name": check.name, "passed": not check.findings, "findings": check.findings}
        for check in checks
    ]
    passed = all(entry["passed"] for entry in entries)
    return json.dumps({"folder": str(place), "passed": passed, "checks": entries}, indent=1)


def _as_text(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        count = len(check.findings)
        said = f"{count} finding{'s' * (count > 1)}" if count else check.about
        lines.append(f"{check.name:8}{'FAILED' if count else 'passed'}  {said}")
        lines += [f"  {finding}" for finding in check.findings[:SHOWN]]
        if count > SHOWN:
            lines.append(f"  and {count - SHOWN} more; --json gives all")
    return "\n".join(lines)

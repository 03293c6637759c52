"""Implement `verify DIR`: check any TensorRT-LLM checkpoint folder without a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.targets.checking import Check
from nemo_vlm_ptq.targets.trtllm.contract import run_contract_checks

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
    checks = run_contract_checks(checkpoint)
    print(_format_json(checkpoint, checks) if as_json else _format_text(checks))
    failed = [check for check in checks if check.findings]
    if failed:
        count = sum(len(check.findings) for check in failed)
        total = f" ({count} findings)" if count > 1 else ""
        raise VerificationError(
            f"verify {checkpoint}: {failed[0].name}: {failed[0].findings[0]}{total}"
        )


def _is_trtllm_config(path: Path) -> bool:
    """Return whether a config.json is TensorRT-LLM's; transformers' has `architectures`."""
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

"""Verify a quantized Megatron checkpoint, which Megatron and modelopt load.

All ranks load it together, in the layout of the run, and compare its logits with those of the model
that was quantized in memory.
"""

from __future__ import annotations

from typing import Any

from nemo_vlm_ptq.context import RunContext, on_rank_zero
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.verify.files import check_files
from nemo_vlm_ptq.verify.model_forms import stored_logits
from nemo_vlm_ptq.verify.target import TOLERANCE, ExpectedLogits, distance

TARGET = "megatron"


def verify_megatron(
    context: RunContext, fmt: QuantFormat, expected: ExpectedLogits
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the checks, and the distances of the logits (collective)."""
    folder = context.plan.export_folder(fmt, TARGET)
    findings = on_rank_zero(context.parallel, lambda: check_files(folder))
    files = _result("files", findings, "sha256 of every file as written")
    if findings:
        return [files], {}
    logits = stored_logits(context, fmt, expected.samples)
    found = distance(logits, expected.rounded)
    line = f"logits differ by {found['mean']:.1e}, {TOLERANCE:.0e} is allowed"
    wrong = [] if found["mean"] <= TOLERANCE else [line]
    facts = found | {"tolerance_mean": TOLERANCE, "samples": len(expected.samples)}
    return [files, _result("logits", wrong, line)], facts


def _result(name: str, findings: list[str], about: str) -> dict[str, Any]:
    detail = "; ".join(findings[:3]) if findings else about
    return {"name": f"{TARGET} {name}", "passed": not findings, "detail": detail}

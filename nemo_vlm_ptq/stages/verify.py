"""verify: read every exported target back and compare it with source, scales and model."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.context import RunContext, on_rank_zero
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, evaluation_questions
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.verify.files import is_unchanged
from nemo_vlm_ptq.verify.megatron import verify_megatron
from nemo_vlm_ptq.verify.model_forms import quantized_logits, source_logits
from nemo_vlm_ptq.verify.target import ExpectedLogits, TargetVerifier
from nemo_vlm_ptq.workdir import store

SAMPLE_COUNT = 8


def verify(context: RunContext) -> None:
    """Verify every exported target of every format.

    Raises:
        VerificationError: a check failed; names the first finding.
    """
    logits = MegatronLogits(context)
    for fmt in context.plan.formats:
        _verify_format(context, fmt, logits)


class MegatronLogits:
    """Logits of the Megatron models; the 16 bit model is run once for all formats."""

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @cached_property
    def samples(self) -> list[Sample]:
        """Questions with their images."""
        plan = self.context.plan
        questions = evaluation_questions(plan.recipe.verification_data, SAMPLE_COUNT)
        prepare = plan.family.make_preprocessor(plan.folder, plan.config)
        return [
            prepare(item.id, item.text + PROMPT_SUFFIX, questions.load_images(item))
            for item in questions.items
        ]

    @cached_property
    def source(self) -> list[torch.Tensor]:
        """Logits of the 16 bit model (collective)."""
        return source_logits(self.context, self.samples)

    def of_format(self, fmt: QuantFormat) -> ExpectedLogits:
        """Return the logits of the quantized and, if needed, the 16 bit model (collective)."""
        rounded, exact = quantized_logits(self.context, fmt, self.samples)
        source = exact if rounded is exact else self.source
        return ExpectedLogits(samples=self.samples, exact=exact, rounded=rounded, source=source)


def _verify_format(context: RunContext, fmt: QuantFormat, logits: MegatronLogits) -> None:
    start = time.monotonic()
    parallel, path = context.parallel, context.folder(fmt.name, "verify.json")
    targets = context.plan.targets(fmt)
    folders = {target: context.plan.export_folder(fmt, target) for target in targets}
    for folder in folders.values():
        store.require_manifest(folder, "export")
    settings = {target: store.hash_manifest(folder) for target, folder in folders.items()}
    if on_rank_zero(parallel, lambda: is_unchanged(folders.values(), _read(path), settings)):
        if parallel.rank == 0:
            parallel.log(
                f"verify {fmt.name}: skipped, it passed before and no file has changed since; "
                "`verify RECIPE --again` repeats it"
            )
        return
    expected = logits.of_format(fmt)
    own: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
    if "megatron" in targets:  # by all ranks together
        own["megatron"] = verify_megatron(context, fmt, expected)
    readable = context.plan.readable_targets(fmt)
    for target in round_robin(readable, parallel.layout.world_size, parallel.rank):
        verifier = TargetVerifier(context, fmt, target, expected)
        verifier.run()
        own[target] = verifier.results, verifier.logits
    gathered = {target: one for part in parallel.all_gather(own) for target, one in part.items()}
    checks = [check for target in targets for check in gathered[target][0]]
    failed = [check for check in checks if not check["passed"]]
    record = {
        "settings": settings,
        "passed": not failed,
        "checks": checks,
        "logits": {target: gathered[target][1] for target in targets},
    }
    if parallel.rank == 0:
        store.write_json(path, record)
        result = "FAILED" if failed else "passed"
        parallel.log(f"verify {fmt.name}: {result} in {time.monotonic() - start:.1f} s")
    if failed:
        raise VerificationError(f"verify {fmt.name}: {failed[0]['name']}: {failed[0]['detail']}")


def _read(path: Path) -> Any:
    """Return the record of an earlier verification, None if there is none that can be read."""
    try:
        return store.read_json(path)
    except (OSError, UserError):
        return None

"""Damage exports at random and count what verify accepts: `python tests/campaigns/exports.py`.

A seed gives the same damages. Each is tried with the manifest as it was written, and signed again,
so that only the content tells. Damage that verify accepts is printed; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from campaigns.damages import DAMAGES, undamaged_bytes

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.targets.trtllm import writer as trtllm_writer
from nemo_vlm_ptq.targets.trtllm.verify_folder import verify_folder
from nemo_vlm_ptq.verify import target as verify_target
from nemo_vlm_ptq.verify.files import list_files
from nemo_vlm_ptq.workdir import store

TARGETS = ("compressed_tensors", "hf", "trtllm")


class Found(BaseException):
    """The first finding."""


class FirstFinding(verify_target.TargetVerifier):
    """Stops at the first finding, and leaves out the logits, which need Megatron's."""

    def _add(self, name: str, findings: list[str], about: str) -> None:
        if findings:
            raise Found(f"{name}: {findings[0]}")

    def _check_logits(self, model: Any) -> None:
        pass


def make_recipe(work: Path, formats: Iterable[str]) -> Recipe:
    return Recipe(
        model=str(models.TINY_LLAVA),
        workdir=str(work),
        quantize={"format": tuple(formats)},
        calibration={"data": "scenes", "samples": 8, "micro_batch": 2},
        export={"targets": TARGETS, "tensor": 2},
    )


def run_campaign(
    parallel: Any, work: Path, formats: Iterable[str], count: int, seed: int
) -> Counter:
    """Damage the exports in a work folder, and restore them; return counts of the outcomes.

    Keys are (how the manifest is, whether verify found the damage); ("folder", ...) counts what
    `verify DIR` finds of damages to TensorRT-LLM checkpoints whose manifest was signed again.
    """
    context = RunContext(plan=make_plan(make_recipe(work, formats)), parallel=parallel)
    pairs = [(fmt, target) for fmt in context.plan.formats for target in context.plan.targets(fmt)]
    rng, counts = random.Random(seed), Counter()
    published, legacy = map(_remember, (verify_target.expected_published, trtllm_writer.expected))
    with (
        mock.patch.object(verify_target, "expected_published", published),
        mock.patch.object(trtllm_writer, "expected", legacy),
    ):
        for fmt, target in pairs:
            assert (finding := first_finding(context, fmt, target)) is None, finding
        while counts["tried"] < count:
            fmt, target = rng.choice(pairs)
            damage, signed = rng.choice(DAMAGES), rng.random() < 0.7
            _try(context, (fmt, target), damage, rng, signed, counts)
    return counts


def _try(context, pair, damage, rng, signed, counts) -> None:
    folder = context.plan.export_folder(*pair)
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.copytree(folder, kept)
    try:
        done = damage(rng, folder)
        if done is None or undamaged_bytes(folder) == undamaged_bytes(kept):
            return
        if signed:
            sign(folder)
        finding = first_finding(context, *pair)
        counts["tried"] += 1
        counts["signed" if signed else "stale", finding is not None] += 1
        where = f"{pair[0].name} {pair[1]} {damage.__name__}: {done}"
        if finding is None:
            print(f"ACCEPTED{' signed' * signed}: {where}", flush=True)
        if pair[1] == "trtllm" and signed:
            found = folder_form_finds(folder)
            counts["folder", found] += 1
            if not found:
                print(f"folder form accepts: {where}", flush=True)
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
        aside = folder.with_name(f"{folder.name}.aside")
        aside.unlink(missing_ok=True)


def folder_form_finds(folder: Path) -> bool:
    """Return whether `verify DIR` finds damage."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            verify_folder(folder, as_json=True)
    except (VerificationError, UserError):
        return True
    return False


def sign(folder: Path) -> None:
    """Make the manifest agree with the files."""
    manifest = store.read_manifest(folder)
    manifest["files"] = store.hash_files(folder, list_files(folder)[0])
    store.write_json(folder / store.MANIFEST, manifest)


def first_finding(context, fmt, target) -> str | None:
    try:
        FirstFinding(context, fmt, target, None).run()
    except Found as found:
        return str(found)
    return None


def _remember(function):
    """Keep the tensors that a function makes again, by its arguments' format and target."""
    made: dict[Any, Any] = {}

    def call(context, fmt, *rest):
        key = (fmt.name, *map(id, rest))
        if key not in made:
            expected = function(context, fmt, *rest)
            made[key] = type(expected)(
                tensors=list(expected.tensors),
                make_json=expected.make_json,
                copied=expected.copied,
            )
        return made[key]

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a work folder of an earlier call, or a new one")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default=",".join(FORMATS))
    arguments = parser.parse_args()
    formats = arguments.formats.split(",")
    work = arguments.work or Path(tempfile.mkdtemp())
    with models.single_rank() as parallel:
        context = RunContext(plan=make_plan(make_recipe(work, formats)), parallel=parallel)
        run_stages(context, ("observe", "solve", "export"))
        counts = run_campaign(parallel, work, formats, arguments.count, arguments.seed)
    for key in ("stale", "signed", "folder"):
        print(f"{key}: {counts[key, True]} found, {counts[key, False]} accepted")
    return int(bool(counts["stale", False] + counts["signed", False]))


if __name__ == "__main__":
    sys.exit(main())

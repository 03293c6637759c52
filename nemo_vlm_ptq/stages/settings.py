"""What the output of each stage depends on; folders made with other settings are rejected."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.model_folder import PROCESSOR_FILES, TOKENIZER_FILES
from nemo_vlm_ptq.data.questions import calibration_questions
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.workdir import store

OUTPUT_KEYS = ("moments", "kept", "solved")  # of an observation: what of it was written
RESOURCE_KEYS = {"window", "keep_statistics", "save_every"}  # of calibration: without effect


def source_identity(plan: Plan) -> str:
    """Return the sha256 over the config, the weights and what makes prompts and pixels.

    Weight files count by name, size and time, the files of tokenizer and processor by content.
    """
    digest = hashlib.sha256(json.dumps(plan.config, sort_keys=True).encode())
    for path in sorted({tensor.file for tensor in plan.tensors.values()}):
        name, status = os.path.relpath(path, plan.folder), path.stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for subfolder in sorted({"", *plan.family.subfolders}):
        for name in sorted({*TOKENIZER_FILES, *PROCESSOR_FILES}):
            path = plan.folder / subfolder / name
            if path.is_file():
                digest.update(f"{subfolder}/{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def source_settings(plan: Plan) -> dict[str, Any]:
    """Return what the 16 bit weights depend on."""
    return {
        "model": str(plan.folder.resolve()),
        "family": plan.family.name,
        "dtype": plan.dtype,
        "source": source_identity(plan),
    }


def observation(plan: Plan) -> dict[str, Any]:
    """Return what the values of the statistics depend on."""
    calibration = plan.recipe.calibration
    return (
        calibration.model_dump(exclude=RESOURCE_KEYS)
        | {"questions": calibration_questions(calibration).identity()}
        | source_settings(plan)
    )


def observed_settings(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """Return the settings of a finished observation of this recipe, or None.

    Raises:
        UserError: the folder was made with another recipe, or holds files of another program.
    """
    manifest = store.read_manifest(folder)
    if manifest is None:
        store.is_finished(folder, {})  # rejects foreign files
        return None
    settings = observation(plan) | {key: manifest["settings"].get(key) for key in OUTPUT_KEYS}
    store.is_finished(folder, settings)
    return settings


def solve_settings(plan: Plan, work: Path, fmt: QuantFormat) -> dict[str, Any]:
    """Return what the scales of a format depend on.

    The observation is the finished one in the workdir, whose data may be gone, else the recipe's.
    """
    manifest = store.read_manifest(work / "statistics")
    values = observation(plan) if manifest is None else manifest["settings"]
    observed = {key: value for key, value in values.items() if key not in OUTPUT_KEYS}
    return (
        _scale_options(plan, fmt) | source_settings(plan) | {"statistics": settings_hash(observed)}
    )


def _scale_options(plan: Plan, fmt: QuantFormat) -> dict[str, Any]:
    """Return the recipe keys that change the scales of a format."""
    quantize = plan.recipe.quantize
    has_groups = fmt.granularity == "group" and fmt.block is None
    smoothquant, searched = fmt.algorithm == "smoothquant", bool(plan.moments_for(fmt))
    return {
        "format": fmt.name,
        "group_size": quantize.group_size if has_groups else None,
        "kv_cache": None if quantize.kv_cache == "none" else quantize.kv_cache,
        "smoothquant_alpha": quantize.smoothquant_alpha if smoothquant else None,
        "image_share": quantize.image_share if searched else None,
    }


def settings_hash(value: Mapping[str, Any]) -> str:
    """Return the sha256 of settings, by which a later stage names them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

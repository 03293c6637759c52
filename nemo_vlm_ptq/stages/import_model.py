"""import: convert the source model into workdir/megatron/."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from dataclasses import replace
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.huggingface import cast_checked, open_source
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, save_model
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.workdir.files import VISION_FILE, rank_files
from nemo_vlm_ptq.workdir.store import save_tensors


def source_identity(plan: Plan) -> str:
    """Return the sha256 over the config and over name, size and time of every weight file."""
    digest = hashlib.sha256(json.dumps(plan.config, sort_keys=True).encode())
    for path in sorted({tensor.file for tensor in plan.tensors.values()}):
        name, status = os.path.relpath(path, plan.folder), path.stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def import_settings(plan: Plan) -> dict[str, Any]:
    """Return what the imported model depends on."""
    return {
        "model": str(plan.folder.resolve()),
        "family": plan.family.name,
        "dtype": plan.dtype,
        "source": source_identity(plan),
    }


def import_model(context: RunContext) -> None:
    """Write the Megatron checkpoint, each rank its own shards, and the vision tensors beside it."""
    plan, parallel, folder = context.plan, context.parallel, context.folder("megatron")

    def body() -> StageOutput:
        before = peak_resident()
        on_cpu = replace(parallel, device=torch.device("cpu"))  # shards are written from the host
        model = build_decoder(plan.decoder, on_cpu, context.dtype)
        with open_source(plan.tensors) as reader:
            parameter_map = plan.family.parameter_map
            bytes_read = load_from_source(
                model, parallel, parameter_map, plan.decoder, reader, written_only=True
            )
            save_model(model, folder)
            if parallel.rank == 0:
                vision = {
                    name: cast_checked(reader.get_tensor(name), name, context.dtype)
                    for name in plan.vision_names
                }
                save_tensors(vision, folder / VISION_FILE)
        memory = {"before": before, "peak": peak_resident()}
        facts = {"bytes_read": [bytes_read], "memory": [memory], "tensors": len(plan.tensors)}
        return StageOutput(rank_files(folder, parallel.rank), facts)

    run_stage(context, "import", folder, import_settings(plan), body)


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes, mapped file pages included.

    The manifest's `memory` lists it for every rank before and after the import.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

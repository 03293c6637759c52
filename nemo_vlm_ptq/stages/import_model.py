"""import: a Hugging Face folder becomes workdir/megatron/."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.huggingface import cast_checked, open_source
from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, save_model
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.workdir.store import save_tensors

VISION_FILE = "vision.safetensors"


def source_identity(plan: Plan) -> str:
    """sha256 over the config and name, size and time of every weight file."""
    digest = hashlib.sha256(json.dumps(plan.config, sort_keys=True).encode())
    for path in sorted({tensor.file for tensor in plan.tensors.values()}):
        name, status = os.path.relpath(path, plan.folder), path.stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def import_settings(plan: Plan) -> dict[str, Any]:
    """What the imported model depends on."""
    return {
        "model": str(plan.folder.resolve()),
        "family": plan.family.name,
        "dtype": plan.dtype,
        "source": source_identity(plan),
    }


def import_model(job: RunContext) -> None:
    """Every rank reads the slices it writes, on the host; tower and projector are kept beside."""
    plan, parallel, folder = job.plan, job.parallel, job.folder("megatron")

    def body() -> StageOutput:
        before = peak_resident()
        host = replace(parallel, device=torch.device("cpu"))  # where they are written from
        model = build_decoder(plan.decoder, host, job.dtype)
        with open_source(plan.tensors) as reader:
            given = (model, parallel, plan.family.parameter_map, plan.decoder, reader)
            read = load_from_source(*given, to_write=True)
            save_model(model, folder)
            if parallel.rank == 0:
                vision = {
                    name: cast_checked(reader.whole(name), name, job.dtype) for name in plan.vision_names
                }
                save_tensors(vision, folder / VISION_FILE)
        names = rank_files(folder, parallel.rank)
        memory = {"before": before, "peak": peak_resident()}
        facts = {"bytes_read": [read], "memory": [memory], "tensors": len(plan.tensors)}
        return StageOutput(names, facts)

    run_stage(job, "import", folder, import_settings(plan), body)


def peak_resident() -> int:
    """Bytes: the most that this process has had in memory so far, pages of mapped files included.

    The manifest's `memory` has it for every rank before and after the import.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_files(folder: Path, rank: int) -> list[str]:
    """Files of a torch_dist checkpoint that this rank answers for; rank 0 also for common ones."""
    shards = [path.name for path in folder.glob(f"__{rank}_*.distcp")]
    if rank:
        return shards
    common = [".metadata", "common.pt", "metadata.json", VISION_FILE]
    return shards + [name for name in common if (folder / name).is_file()]

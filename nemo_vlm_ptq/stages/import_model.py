"""import: convert the source model into workdir/megatron/."""

from __future__ import annotations

import resource
from dataclasses import replace

import torch

from nemo_vlm_ptq.context import RunContext, StageOutput, run_stage
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, save_model
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision
from nemo_vlm_ptq.stages.settings import source_settings
from nemo_vlm_ptq.workdir.files import VISION_FILE, rank_files
from nemo_vlm_ptq.workdir.store import save_tensors


def import_model(context: RunContext) -> None:
    """Write the Megatron checkpoint, each rank its own shards, and the vision tensors beside it."""
    plan, parallel, folder = context.plan, context.parallel, context.folder("megatron")

    def body() -> StageOutput:
        before = peak_resident()
        on_cpu = replace(parallel, device=torch.device("cpu"))  # shards are written from the host
        model = build_decoder(plan.decoder, on_cpu, context.dtype)
        with open_weights(plan, on_cpu.device) as weights:
            bytes_read = load_from_source(model, on_cpu, weights, written_only=True)
        save_model(model, folder)
        if parallel.rank == 0:
            save_tensors(read_vision(plan), folder / VISION_FILE)
        memory = {"before": before, "peak": peak_resident()}
        facts = {"bytes_read": [bytes_read], "memory": [memory], "tensors": len(plan.tensors)}
        return StageOutput(rank_files(folder, parallel.rank), facts)

    run_stage(context, "import", folder, source_settings(plan), body)


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes, mapped file pages included.

    The manifest's `memory` lists it for every rank before and after the import.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

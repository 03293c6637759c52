"""solve: compute the scales of every format from statistics and weights, without data."""

from __future__ import annotations

from functools import partial

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.statistics import layer_file
from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero, run_stage
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.sources.decoder_weights import open_weights
from nemo_vlm_ptq.stages.layer_solver import LayerSolver, solved_layers, unsolved_formats
from nemo_vlm_ptq.stages.settings import solve_settings
from nemo_vlm_ptq.utils.pinned_memory import to_device
from nemo_vlm_ptq.utils.prefetch import prefetch_to_device
from nemo_vlm_ptq.utils.progress import progress_bar
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import checked_file, read_hashes

MOMENT_NAMES = {"sketch": "sketches", "whole": "whole second moments"}


def solve(context: RunContext) -> None:
    """Finish the scales of every format.

    In a run that observes, too, the layers were solved there. Otherwise weights and statistics of a
    layer are read once for all formats that lack it.
    """
    formats = unsolved_formats(context)
    if formats:
        on_rank_zero(context.parallel, partial(_require_statistics, context, formats))
        _solve_from_files(context, formats)
    for fmt in context.plan.formats:
        folder = context.folder(fmt.name, "scales")
        settings = solve_settings(context.plan, context.workdir, fmt)
        run_stage(context, f"solve {fmt.name}", folder, settings, partial(_finish, context, fmt))


def _finish(context: RunContext, fmt: QuantFormat) -> StageOutput:
    """Return the files of all layers, listed by rank 0."""
    if context.parallel.rank:
        return StageOutput()
    solved = solved_layers(context, fmt)
    layers = range(context.plan.decoder.layers)
    entries = [entry for layer in layers for entry in solved[str(layer)]]
    sha256 = read_hashes(context.folder(fmt.name, "scales"))
    return StageOutput([layer_file(layer) for layer in layers], {"layers": entries}, sha256)


def _require_statistics(context: RunContext, formats: list[QuantFormat]) -> None:
    """Check that the statistics of this recipe lie in the workdir.

    Raises:
        UserError: they do not, or they lack what a format needs.
    """
    folder = context.folder("statistics")
    manifest = store.require_manifest(folder, "observe")
    names = ", ".join(fmt.name for fmt in formats)
    if not manifest["settings"].get("kept"):
        raise UserError(
            f"{folder} holds no statistics, which solving {names} needs; run observe and solve "
            "together (run, or calibrate), or observe with calibration.keep_statistics=true first"
        )
    for fmt in formats:
        needed = context.plan.moments_for(fmt)
        if needed and needed not in manifest["settings"]["moments"]:
            raise UserError(
                f"{folder} has no {MOMENT_NAMES[needed]}, which {fmt.name} needs; run observe with "
                "this format in quantize.format"
            )


def _solve_from_files(context: RunContext, formats: list[QuantFormat]) -> None:
    """Solve this rank's layers, assigned round-robin over all ranks, with prefetching."""
    parallel, folder = context.parallel, context.folder("statistics")

    def read(layer: int) -> dict[str, torch.Tensor]:
        path = checked_file(folder, layer_file(layer))
        stored = load_file(path)  # to a GPU directly is a pageable copy
        return {name: to_device(tensor, parallel.device) for name, tensor in stored.items()}

    layers = range(context.plan.decoder.layers)
    assigned = round_robin(layers, parallel.layout.world_size, parallel.rank)
    label = f"solve {', '.join(fmt.name for fmt in formats)}"
    with open_weights(context.plan, parallel.device) as weights:
        solver = LayerSolver(context, formats, weights)
        with progress_bar(label, "layer", parallel.rank, len(assigned)) as bar:
            for layer, tensors in prefetch_to_device(assigned, read, parallel.device):
                solver.consume(layer, tensors, None)
                bar.update()
        solver.commit()

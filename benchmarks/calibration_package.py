"""Part package of benchmarks/calibration.py: observe and solve of this package.

Cases run from a checkpoint to scale files, as the stages do. Time spent on files is measured
separately, because it depends on the file system and not on the calibration.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calibration_common import (
    CASE_FORMATS,
    FAMILY,
    FORWARD,
    GROUP_SIZE,
    IMAGE_TOKENS,
    OBSERVE_MAXIMA,
    OBSERVE_MOMENTS,
    Workload,
    log,
)
from calibration_model import RandomFeatures, build_random_decoder, run_forward
from calibration_timing import Case
from megatron.core.models.gpt import GPTModel
from profiling import profile

from nemo_vlm_ptq.calibrate.observe import loop as observe_loop
from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, save_scales, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.statistics import (
    LINEARS,
    InputStatistics,
    assemble_layer,
    load_layer,
    load_token_counts,
)
from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import LayerReader, load_model, save_model
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.utils.prefetch import prefetch_to_device
from nemo_vlm_ptq.workdir.store import hash_file

PROFILED_MICRO_BATCHES = 2
Solved = tuple[str, int, Any]  # format, layer, scales


def _identity_preprocess(micro_batch: observe_loop.MicroBatch, encodes_images: bool) -> list[Any]:
    """Return the samples, which are preprocessed already."""
    return list(micro_batch)


def _needs_second_moments(names: Sequence[str]) -> bool:
    return any(FORMATS[name].algorithm == "awq" for name in names)


class PackageBenchmark:
    """The model, its Megatron checkpoint, and the files of observe and solve."""

    def __init__(self, parallel: ParallelContext, workload: Workload, folder: Path) -> None:
        self.parallel, self.workload, self.folder = parallel, workload, folder
        self.passes = 0  # passes over the data of the latest observe
        self.checkpoint = folder / f"megatron-{workload.layers}"
        self.scales_folder = folder / f"scales-{workload.layers}"
        self._create_empty(self.scales_folder)
        if parallel.layout.tensor > 1 and not (self.checkpoint / ".metadata").is_file():
            self._write_checkpoint()  # solve reads unsharded weights from it
        log(f"building {workload.layers} layers")
        if parallel.layout.tensor == 1:
            model = build_random_decoder(parallel, workload, parallel.device, for_calibration=True)
        else:
            model = self._load_checkpoint()
        vision = RandomFeatures(workload, parallel.device)
        self.setup = observe_loop.ObserveSetup(
            model=model, vision=vision, parallel=parallel, preprocess=_identity_preprocess
        )

    def _load_checkpoint(self) -> GPTModel:
        """Return the model as observe builds it on tensor ranks."""
        model = build_decoder(
            self.workload.decoder, self.parallel, torch.bfloat16, for_calibration=True
        )
        load_model(model, self.checkpoint)
        return model

    def _write_checkpoint(self) -> None:
        """Write the Megatron checkpoint from the host, as import does."""
        self._create_empty(self.checkpoint)
        on_cpu = replace(self.parallel, device=torch.device("cpu"))
        model = build_random_decoder(on_cpu, self.workload, self.parallel.device)
        save_model(model, self.checkpoint)
        self.parallel.barrier()

    def _create_empty(self, folder: Path) -> None:
        if self.parallel.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.parallel.barrier()

    def _statistics_folder(self, second_moments: bool) -> Path:
        name = "moments" if second_moments else "maxima"
        return self.folder / f"{name}-{self.workload.layers}"

    def forward(self, micro_batches: list[Any]) -> float:
        """Run the forward pass of these ranks, without output layer as in observe."""
        layout, data_rank = self.parallel.layout, self.parallel.data_rank
        assigned = list(round_robin(micro_batches, layout.data, data_rank))
        run_forward(self.setup.model, self.parallel, assigned, self.setup.vision.features)
        return 0.0

    def observe(self, micro_batches: list[Any], second_moments: bool, **options: Any) -> float:
        """Run observe, its files included; return the seconds of reducing and saving."""
        observe_options = observe_loop.ObserveOptions(second_moments=second_moments, **options)
        folder = self._statistics_folder(second_moments)
        with self._time_saving() as saving_seconds:
            result = observe_loop.observe(self.setup, micro_batches, folder, observe_options, {})
        self.passes = len(result.passes)
        return sum(saving_seconds)

    def calibrate(self, micro_batches: list[Any], names: Sequence[str]) -> float:
        """Run observe and solve as the stages do; return the seconds spent on files.

        Without tensor parallelism a layer is solved while its statistics are written.
        """
        second_moments = _needs_second_moments(names)
        scales_folder = self.scales_folder / f"{sum(map(len, micro_batches))}"
        if self.parallel.layout.tensor > 1:
            saving_seconds = self.observe(micro_batches, second_moments)
            return saving_seconds + self._solve_from_files(names, second_moments, scales_folder)
        solved: list[Solved] = []
        blocks, solve_seconds = list(self.setup.model.decoder.layers), [0.0]

        def consume(layer: int, tensors: Any) -> None:
            self._synchronize()
            start = time.perf_counter()
            paths = LINEARS.items()
            weights = {name: blocks[layer].get_submodule(path).weight.data for name, path in paths}
            solved.extend(self._solve(layer, weights, assemble_layer(dict(tensors)), names))
            self._synchronize()
            solve_seconds[0] += time.perf_counter() - start

        saving_seconds = self.observe(micro_batches, second_moments, consume=consume)
        return saving_seconds - solve_seconds[0] + self._save(solved, scales_folder)

    def _solve(
        self, layer: int, weights: Any, statistics: Mapping[str, Any], names: Sequence[str]
    ) -> Iterator[Solved]:
        """Solve one layer for all formats, scales on the CPU."""
        sizes = self.workload.decoder.sizes(VOCAB_MULTIPLE)
        statistics = {
            linear: one.with_output_power(weights[linear]) for linear, one in statistics.items()
        }
        for name in names:
            inputs = weights, statistics, FORMATS[name], GROUP_SIZE, sizes
            solved = solve_layer(*inputs, SolveOptions(), FAMILY.parameter_map)
            yield name, layer, {linear: scales.to_cpu() for linear, scales in solved.items()}

    def _save(self, solved: list[Solved], folder: Path) -> float:
        """Write the scales; return the seconds."""
        start = time.perf_counter()
        for name, layer, scales in solved:
            format_folder = folder / name
            format_folder.mkdir(parents=True, exist_ok=True)
            save_scales(format_folder, layer, scales)
        return time.perf_counter() - start

    def hash_scales(self) -> dict[str, str]:
        """Return the sha256 of the latest scales of each format and number of samples."""
        digests = {}
        for folder in sorted(self.scales_folder.glob("*/*")):
            hashes = [hash_file(path) for path in sorted(folder.iterdir())]
            label = f"{folder.name}, {folder.parent.name} samples"
            digests[label] = hashlib.sha256("".join(hashes).encode()).hexdigest()
        return digests

    @contextmanager
    def _time_saving(self) -> Iterator[list[float]]:
        """Record the seconds of every reduce_and_save of observe."""
        original, seconds = observe_loop.reduce_and_save, []

        def timed(*args: Any, **options: Any) -> dict[str, str]:
            self._synchronize()
            start = time.perf_counter()
            files = original(*args, **options)
            self._synchronize()
            seconds.append(time.perf_counter() - start)
            return files

        observe_loop.reduce_and_save = timed
        try:
            yield seconds
        finally:
            observe_loop.reduce_and_save = original

    def _solve_from_files(
        self, names: Sequence[str], second_moments: bool, scales_folder: Path
    ) -> float:
        """Solve this rank's layers for all formats, reading each layer once.

        Returns:
            Seconds of waiting for prefetched layers and of writing scales.
        """
        parallel, folder = self.parallel, self._statistics_folder(second_moments)
        reader, file_seconds = LayerReader(self.checkpoint), 0.0
        solved: list[Solved] = []

        def load(layer: int) -> tuple[dict[str, torch.Tensor], dict[str, InputStatistics]]:
            linears = weight_names(layer)
            tensors = reader.read(linears.values())
            weights = {linear: tensors[key].to(parallel.device) for linear, key in linears.items()}
            return weights, load_layer(folder, layer, parallel.device)

        layers = range(self.workload.layers)
        assigned = round_robin(layers, parallel.layout.world_size, parallel.rank)
        start = time.perf_counter()
        for layer, (weights, statistics) in prefetch_to_device(assigned, load, parallel.device):
            file_seconds += time.perf_counter() - start
            solved.extend(self._solve(layer, weights, statistics, names))
            start = time.perf_counter()
        return file_seconds + time.perf_counter() - start + self._save(solved, scales_folder)

    def _synchronize(self) -> None:
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()

    def check_token_counts(self, samples: int, second_moments: bool) -> None:
        """Check that the written statistics cover every token.

        Raises:
            RuntimeError: they do not.
        """
        expected = [samples * self.workload.text_tokens, samples * IMAGE_TOKENS]
        found = list(load_token_counts(self._statistics_folder(second_moments), 0))
        if found != expected:
            raise RuntimeError(f"statistics cover {found} text and image tokens, not {expected}")

    def statistics_gigabytes(self) -> float:
        """Return the size of the statistics with second moments in GB."""
        files = self._statistics_folder(True).glob("*.safetensors")
        return sum(path.stat().st_size for path in files) / 1e9

    def cases(self, samples: int, observe_alone: bool = True) -> Iterator[Case]:
        """Yield the cases with a number of samples, in the order of measurement.

        Args:
            samples: number of samples.
            observe_alone: also measure observe without solve.
        """
        micro_batches = self.workload.micro_batches(samples)
        yield Case(
            name=FORWARD,
            samples=samples,
            setup=lambda: None,
            run=lambda _: self.forward(micro_batches),
        )
        if observe_alone:
            for name, second_moments in ((OBSERVE_MAXIMA, False), (OBSERVE_MOMENTS, True)):
                observe = partial(self.observe, micro_batches, second_moments)
                yield self._checked_case(name, samples, second_moments, observe)
        for name, formats in CASE_FORMATS.items():
            calibrate = partial(self.calibrate, micro_batches, formats)
            yield self._checked_case(name, samples, _needs_second_moments(formats), calibrate)

    def _checked_case(
        self, name: str, samples: int, second_moments: bool, function: Callable[[], float]
    ) -> Case:
        def run(_: Any) -> float:
            file_seconds = function()
            self.check_token_counts(samples, second_moments)
            return file_seconds

        def setup() -> None:
            self._create_empty(self._statistics_folder(second_moments))

        return Case(name=name, samples=samples, setup=setup, run=run)

    def profiles(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (label, profile) of observe with second moments, and of observe and solve."""
        micro_batches = self.workload.micro_batches(
            PROFILED_MICRO_BATCHES * self.workload.micro_batch
        )
        suffix = f"{sum(map(len, micro_batches))} samples, {self.workload.layers} layers"
        for label, function in (
            ("observe with second moments", partial(self.observe, micro_batches, True)),
            ("observe and solve, int4_awq", partial(self.calibrate, micro_batches, ["int4_awq"])),
        ):
            self._create_empty(self._statistics_folder(True))
            yield f"{label}, {suffix}", profile(function, self.parallel.device)

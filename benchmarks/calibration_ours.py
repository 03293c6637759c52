"""This project's part of benchmarks/calibration.py: what is timed of observe and solve."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calibration_setting import (
    ASKED,
    FAMILY,
    FORWARD,
    GROUP,
    IMAGE_TOKENS,
    MAXIMA,
    MOMENTS,
    Case,
    Features,
    Setting,
    Weights,
    log,
)
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate.observe import loop as observing
from nemo_vlm_ptq.calibrate.solve.layer import SolveOptions, save_scales, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.statistics import (
    LINEARS,
    InputStatistics,
    assemble_layer,
    load_layer,
    load_tokens,
)
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import LayerReader, load_from_source, load_model, save_model
from nemo_vlm_ptq.megatron.forward import collate, forward
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext
from nemo_vlm_ptq.planning.plan import VOCAB_MULTIPLE
from nemo_vlm_ptq.utils.device_prefetch import prefetch_to_device
from nemo_vlm_ptq.workdir.store import hash_file

TOP = 12  # kernels of a profile
PROFILED_CHUNKS = 2
Solved = tuple[str, int, Any]  # format, layer, scales


def build(
    own: ParallelContext, setting: Setting, drawn_on: torch.device, *, to_observe: bool = False
) -> GPTModel:
    """The decoder's shards of this rank with the random weights, made where they will lie."""
    model = build_decoder(setting.decoder, own, torch.bfloat16, to_observe=to_observe)
    weights: Any = Weights(setting, drawn_on)
    load_from_source(model, own, FAMILY.parameter_map, setting.decoder, weights)
    return model


def run_plainly(
    model: GPTModel, own: ParallelContext, chunks: list[Any], features: torch.Tensor
) -> None:
    """Micro-batches through the model, and nothing else."""
    for chunk in chunks:
        forward(model, own, collate(chunk), features.repeat(len(chunk), 1))


def _ready(chunk: observing.MicroBatch, looks: bool) -> list[Any]:
    """Samples that need not be prepared."""
    return list(chunk)


class Ours:
    """The model, its checkpoint as import writes it, and the files of observe and solve."""

    def __init__(self, own: ParallelContext, setting: Setting, folder: Path) -> None:
        self.own, self.setting, self.folder = own, setting, folder
        self.passes = 0  # of the last observe
        self.weights = folder / f"megatron-{setting.layers}"
        self._empty(folder / f"scales-{setting.layers}")
        if own.layout.tensor > 1 and not (self.weights / ".metadata").is_file():
            self._import()  # solve reads whole weights there
        log(f"building {setting.layers} layers")
        alone = own.layout.tensor == 1
        model = build(own, setting, own.device, to_observe=True) if alone else self._loaded()
        self.work = observing.ObserveSetup(model, Features(setting, own.device), own, _ready)

    def _loaded(self) -> GPTModel:
        """As observe builds it on tensor ranks."""
        model = build_decoder(self.setting.decoder, self.own, torch.bfloat16, to_observe=True)
        load_model(model, self.weights)
        return model

    def _import(self) -> None:
        """Write the checkpoint, from the host as import does."""
        self._empty(self.weights)
        host = replace(self.own, device=torch.device("cpu"))
        save_model(build(host, self.setting, self.own.device), self.weights)
        self.own.barrier()

    def _empty(self, folder: Path) -> None:
        if self.own.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.own.barrier()

    def _statistics(self, moments: bool) -> Path:
        return self.folder / f"{'moments' if moments else 'maxima'}-{self.setting.layers}"

    def forward(self, chunks: list[Any]) -> float:
        """The plain forward of these ranks, without the head as observe has it."""
        mine = list(round_robin(chunks, self.own.layout.data, self.own.data))
        run_plainly(self.work.model, self.own, mine, self.work.vision.drawn)
        return 0.0

    def observe(self, chunks: list[Any], moments: bool, **options: Any) -> float:
        """As the stage does, its files included; returns the seconds of reducing and saving."""
        limits = observing.ObserveOptions(moments, **options)
        with self._saving_timed() as spent:
            run = observing.observe(self.work, chunks, self._statistics(moments), limits, {})
        self.passes = len(run.passes)
        return sum(spent)

    def calibrate(self, chunks: list[Any], names: Sequence[str]) -> float:
        """Observe and solve as the stages do; returns the seconds of files.

        A rank with whole weights solves a layer while its statistics are written.
        """
        moments = any(FORMATS[name].algorithm == "awq" for name in names)
        scales = self.folder / f"scales-{self.setting.layers}" / f"{sum(map(len, chunks))}"
        if self.own.layout.tensor > 1:
            saving = self.observe(chunks, moments)
            return saving + self._solve_from_files(names, moments, scales)
        solved: list[Solved] = []
        blocks, solving = list(self.work.model.decoder.layers), [0.0]

        def consume(layer: int, tensors: Any) -> None:
            self._wait()
            start = time.perf_counter()
            paths = LINEARS.items()
            weights = {key: blocks[layer].get_submodule(path).weight.data for key, path in paths}
            solved.extend(self._solve(layer, weights, assemble_layer(dict(tensors)), names))
            self._wait()
            solving[0] += time.perf_counter() - start

        saving = self.observe(chunks, moments, consume=consume) - solving[0]
        return saving + self._save(solved, scales)

    def _solve(
        self, layer: int, weights: Any, seen: dict[str, InputStatistics], names: Sequence[str]
    ) -> Iterator[Solved]:
        sizes = self.setting.decoder.sizes(VOCAB_MULTIPLE)
        seen = {name: one.with_output_power(weights[name]) for name, one in seen.items()}
        for name in names:
            given = (
                weights,
                seen,
                FORMATS[name],
                GROUP,
                sizes,
                SolveOptions(),
                FAMILY.parameter_map,
            )
            yield name, layer, {key: one.to_cpu() for key, one in solve_layer(*given).items()}

    def _save(self, solved: list[Solved], folder: Path) -> float:
        begin = time.perf_counter()
        for name, layer, scales in solved:
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            save_scales(place, layer, scales)
        return time.perf_counter() - begin

    def scales(self) -> dict[str, str]:
        """Sha256 of all scales by samples and format, of the last run of each."""
        home = self.folder / f"scales-{self.setting.layers}"
        found = {}
        for place in sorted(home.glob("*/*")):
            hashes = [hash_file(path) for path in sorted(place.iterdir())]
            about = f"{place.name}, {place.parent.name} samples"
            found[about] = hashlib.sha256("".join(hashes).encode()).hexdigest()
        return found

    @contextmanager
    def _saving_timed(self) -> Iterator[list[float]]:
        real, spent = observing.reduce_and_save, []

        def timed(*args: Any, **options: Any) -> list[str]:
            self._wait()
            start = time.perf_counter()
            files = real(*args, **options)
            self._wait()
            spent.append(time.perf_counter() - start)
            return files

        observing.reduce_and_save = timed
        try:
            yield spent
        finally:
            observing.reduce_and_save = real

    def _solve_from_files(self, names: Sequence[str], moments: bool, scales: Path) -> float:
        """Formats from one reading, layers dealt over ranks; returns the seconds of files.

        These are those of waiting for what is read ahead, and of writing.
        """
        own, folder, spent = self.own, self._statistics(moments), 0.0
        reader = LayerReader(self.weights)
        solved: list[Solved] = []

        def read(layer: int) -> tuple[dict[str, torch.Tensor], dict[str, InputStatistics]]:
            linears = weight_names(layer)
            tensors = reader.read(linears.values())
            weights = {linear: tensors[key].to(own.device) for linear, key in linears.items()}
            return weights, load_layer(folder, layer, own.device)

        mine = round_robin(range(self.setting.layers), own.layout.world, own.rank)
        begin = time.perf_counter()
        for layer, (weights, seen) in prefetch_to_device(mine, read, own.device):
            spent += time.perf_counter() - begin
            solved.extend(self._solve(layer, weights, seen, names))
            begin = time.perf_counter()
        return spent + time.perf_counter() - begin + self._save(solved, scales)

    def _wait(self) -> None:
        if self.own.device.type == "cuda":
            torch.cuda.synchronize()

    def check(self, samples: int, moments: bool) -> None:
        """Every token is in the statistics that were written.

        Raises:
            RuntimeError: there are others.
        """
        given = [samples * self.setting.text_tokens, samples * IMAGE_TOKENS]
        if (seen := list(load_tokens(self._statistics(moments), 0))) != given:
            raise RuntimeError(f"{given} tokens of text and images were given, {seen} observed")

    def written(self) -> float:
        """GB of statistics with second moments."""
        files = self._statistics(True).glob("*.safetensors")
        return sum(path.stat().st_size for path in files) / 1e9

    def cases(self, samples: int, alone: bool = True) -> Iterator[Case]:
        """What is measured with so many samples, in order; alone: observe by itself, too."""
        chunks = self.setting.chunks(samples)
        yield Case(FORWARD, samples, lambda: None, lambda _: self.forward(chunks))
        for what, moments in ((MAXIMA, False), (MOMENTS, True)) if alone else ():
            yield self._case(what, samples, moments, partial(self.observe, chunks, moments))
        for what in ASKED:
            moments = any(FORMATS[name].algorithm == "awq" for name in ASKED[what])
            yield self._case(what, samples, moments, partial(self.calibrate, chunks, ASKED[what]))

    def _case(self, what: str, samples: int, moments: bool, act: Callable[[], float]) -> Case:
        def checked(_: Any) -> float:
            spent = act()
            self.check(samples, moments)
            return spent

        return Case(what, samples, lambda: self._empty(self._statistics(moments)), checked)

    def profiles(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(what, kernels by time) of observe with second moments, and of int4_awq as a whole."""
        chunks = self.setting.chunks(PROFILED_CHUNKS * self.setting.micro_batch)
        about = f"{sum(map(len, chunks))} samples, {self.setting.layers} layers"
        for what, act in (
            ("observe with second moments", partial(self.observe, chunks, True)),
            ("observe and solve, int4_awq", partial(self.calibrate, chunks, ["int4_awq"])),
        ):
            self._empty(self._statistics(True))
            yield f"{what}, {about}", profile(act, self.own.device)


def profile(act: Any, device: torch.device) -> dict[str, Any]:
    """Seconds of the wall and of all kernels (of a CPU: operations), and the longest of them."""
    from torch.profiler import ProfilerActivity

    gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    start = time.perf_counter()
    with torch.profiler.profile(activities=[activity]) as seen:
        act()
        if gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    rows = [
        (one.key, one.count, (one.self_device_time_total if gpu else one.self_cpu_time_total) / 1e6)
        for one in seen.key_averages()
        if not gpu or one.device_type == torch.autograd.DeviceType.CUDA
    ]
    rows.sort(key=lambda row: -row[2])
    return {"wall": wall, "total": sum(row[2] for row in rows), "rows": rows[:TOP]}

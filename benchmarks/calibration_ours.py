"""This project's part of benchmarks/calibration.py: what is timed of observe and solve."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibration_setting import (
    FAMILY,
    FIVE,
    FORWARD,
    FROM_MAXIMA,
    GROUP,
    IMAGE_TOKENS,
    MAXIMA,
    MOMENTS,
    SOLVE_ALL,
    Case,
    Features,
    Setting,
    Weights,
    log,
    solve_name,
)
from megatron.core.models.gpt import GPTModel

from nemo_vlm_ptq.calibrate import observe as observing
from nemo_vlm_ptq.calibrate.ahead import read_ahead
from nemo_vlm_ptq.calibrate.solve import Wishes, save_scales, solve_layer, weight_names
from nemo_vlm_ptq.calibrate.statistics import InputStatistics, load_layer, load_tokens
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import LayerReader, fill_from_source, save_model
from nemo_vlm_ptq.megatron.forward import collate, forward
from nemo_vlm_ptq.megatron.session import Session
from nemo_vlm_ptq.parallel import deal
from nemo_vlm_ptq.plan import VOCAB_MULTIPLE

TOP = 12  # kernels of a profile
PROFILED_CHUNKS = 2


def build(own: Session, setting: Setting, drawn_on: torch.device) -> GPTModel:
    """The decoder's shards of this rank with the random weights, made where they will lie."""
    with own.device:
        model = build_decoder(setting.decoder, own, torch.bfloat16)
    weights: Any = Weights(setting, drawn_on)
    fill_from_source(model, own, FAMILY.rows, setting.decoder, weights)
    return model


def run_plainly(model: GPTModel, own: Session, chunks: list[Any], features: torch.Tensor) -> None:
    """Micro-batches through the model, and nothing else."""
    for chunk in chunks:
        forward(model, own, collate(chunk), [features for _ in chunk])


class Ours:
    """The model, its checkpoint as import writes it, and the files of observe and solve."""

    def __init__(self, own: Session, setting: Setting, folder: Path) -> None:
        self.own, self.setting, self.folder = own, setting, folder
        self.passes = 0  # of the last observe
        self.weights = folder / f"megatron-{setting.layers}"
        if not (self.weights / ".metadata").is_file():
            self._import()
        log(f"building {setting.layers} layers")
        model = build(own, setting, own.device)
        self.work = observing.Work(model, Features(setting, own.device), own, list)

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
        """The plain forward of these ranks."""
        mine = list(deal(chunks, self.own.layout.data, self.own.data))
        run_plainly(self.work.model, self.own, mine, self.work.vision.drawn)
        return 0.0

    def observe(self, chunks: list[Any], moments: bool) -> float:
        """As the stage does, its files included; returns the seconds of reducing and saving."""
        limits = observing.Limits(moments)
        with self._saving_timed() as spent:
            run = observing.observe(self.work, chunks, self._statistics(moments), limits, {})
        self.passes = len(run.passes)
        return sum(spent)

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

    def solve(self, names: Sequence[str], moments: bool) -> float:
        """Formats from one reading, as the stage does, layers dealt over ranks.

        Returns:
            Seconds of waiting for what is read ahead, and of writing.
        """
        own, folder, spent = self.own, self._statistics(moments), 0.0
        sizes, reader = self.setting.decoder.sizes(VOCAB_MULTIPLE), LayerReader(self.weights)

        def read(layer: int) -> tuple[dict[str, torch.Tensor], dict[str, InputStatistics]]:
            linears = weight_names(layer)
            tensors = reader.read(linears.values())
            weights = {linear: tensors[key].to(own.device) for linear, key in linears.items()}
            return weights, load_layer(folder, layer, own.device)

        mine, solved = deal(range(self.setting.layers), own.layout.world, own.rank), []
        begin = time.perf_counter()
        for layer, (weights, seen) in read_ahead(mine, read, own.device):
            spent += time.perf_counter() - begin
            for name in names:
                given = (weights, seen, FORMATS[name], GROUP, sizes, Wishes(), FAMILY.rows)
                scales = {key: one.on_host() for key, one in solve_layer(*given).items()}
                solved.append((folder / name, layer, scales))
            begin = time.perf_counter()
        for place, layer, scales in solved:
            save_scales(place, layer, scales)
        return spent + time.perf_counter() - begin

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

    def cases(self, samples: int) -> Iterator[Case]:
        """What is measured with so many samples, in order; solve does not depend on them."""
        chunks = self.setting.chunks(samples)
        yield Case(FORWARD, samples, lambda: None, lambda _: self.forward(chunks))
        yield self._observe_case(MAXIMA, samples, chunks, False)
        yield self._observe_case(MOMENTS, samples, chunks, True)
        if samples != self.setting.samples:
            return
        for name in FROM_MAXIMA:
            yield self._solve_case(solve_name(name, maxima=True), [name], False)
        yield self._solve_case(SOLVE_ALL, FIVE, True)
        for name in sorted(FIVE, key=lambda name: name in FROM_MAXIMA):  # those come last
            yield self._solve_case(solve_name(name), [name], True)

    def _observe_case(self, what: str, samples: int, chunks: list[Any], moments: bool) -> Case:
        def act(_: Any) -> float:
            spent = self.observe(chunks, moments)
            self.check(samples, moments)
            return spent

        return Case(what, samples, lambda: self._empty(self._statistics(moments)), act)

    def _solve_case(self, what: str, names: Sequence[str], moments: bool) -> Case:
        def prepare() -> None:
            for name in names:
                self._empty(self._statistics(moments) / name)

        return Case(what, self.setting.samples, prepare, lambda _: self.solve(names, moments))

    def profiles(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(what, kernels by time) of one observe with second moments, and of one AWQ solve."""
        chunks = self.setting.chunks(PROFILED_CHUNKS * self.setting.micro_batch)
        layers = self.setting.layers
        self._empty(self._statistics(True))
        yield (
            f"observe with second moments, {sum(map(len, chunks))} samples, {layers} layers",
            profile(lambda: self.observe(chunks, True), self.own.device),
        )
        self._empty(self._statistics(True) / "int4_awq")
        yield (
            f"solve int4_awq, {layers} layers",
            profile(lambda: self.solve(["int4_awq"], True), self.own.device),
        )


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

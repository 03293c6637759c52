"""What the parts of benchmarks/calibration.py share: sizes, weights, batches, clock and numbers."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from random_model import _noise, published_config

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.base import Decoder, ImageInputs, Sample

if TYPE_CHECKING:
    from nemo_vlm_ptq.megatron.parallel_context import ParallelContext

FAMILY = FAMILIES["llava"]
MODEL = "llava-1.5-7b-hf"
IMAGE_TOKENS = 576
GROUP = 128  # weights that share an int4 scale
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 512}
FORWARD, MAXIMA, MOMENTS = "plain forward", "observe, maxima", "observe, second moments"
FIVE = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
ALL = "all five"
ASKED = {**{name: (name,) for name in ("fp8", "int8_sq", "int4_awq")}, ALL: FIVE}
PRESETS = {"fp8": "FP8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG", "int4_awq": "INT4_AWQ_CFG"}


def log(message: str) -> None:
    """A line on stderr with the time of day, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Point:
    """A set of ranks, and what runs on them.

    part: ours, modelopt or profile; share: of the time there is, against other points.
    """

    name: str
    part: str
    about: str
    tensor: int = 1
    data: int = 1
    share: float = 1.0

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tensor * self.data


POINTS = {
    point.name: point
    for point in (
        Point("ours-1", "ours", "1 rank"),
        Point("ours-dp2", "ours", "DP 2", data=2),
        Point("ours-tp2", "ours", "TP 2", tensor=2),
        Point("profile", "profile", "1 rank", share=0.3),
        Point("modelopt-hf", "modelopt", "Hugging Face model, one device"),
        Point("modelopt-split", "modelopt", "Hugging Face model split over two GPUs"),
        Point("modelopt-tp1", "modelopt", "Megatron-core, one rank"),
        Point("modelopt-tp2", "modelopt", "Megatron-core, TP 2", tensor=2),
    )
}


@dataclass(frozen=True)
class Setting:
    """Sizes of everything that is measured."""

    layers: int
    samples: int
    more_samples: int
    text_tokens: int
    micro_batch: int
    repeats: int
    small: bool

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the model."""
        config = published_config(MODEL)
        config["text_config"] |= {"num_hidden_layers": self.layers}
        config["text_config"] |= SMALL if self.small else {}
        return config

    @cached_property
    def decoder(self) -> Decoder:
        """Facts of its decoder."""
        return FAMILY.decoder(self.config)

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return IMAGE_TOKENS + self.text_tokens

    @property
    def weights(self) -> int:
        """Of the linears."""
        rows = tuple(row for row in FAMILY.parameter_map if row.is_linear)
        return sum(math.prod(shape) for shape in self.decoder.shapes(rows).values())

    def flop(self, samples: int) -> float:
        """Of a forward without head: linears, and the half of the attention that is not masked."""
        decoder = self.decoder
        attention = 2 * decoder.layers * self.length**2 * decoder.heads * decoder.head_dim
        return samples * (2.0 * self.weights * self.length + attention)

    def chunks(self, samples: int) -> list[list[Sample]]:
        """Micro-batches of samples with an image in the middle of their text."""
        generator = torch.Generator().manual_seed(0)
        start, pixels = self.text_tokens // 2, ImageInputs(torch.zeros(1, 3, 2, 2))
        is_image = torch.zeros(self.length, dtype=torch.bool)
        is_image[start : start + IMAGE_TOKENS] = True
        vocabulary = self.decoder.vocab
        made = [
            torch.randint(vocabulary, (self.length,), generator=generator) for _ in range(samples)
        ]
        ready = [Sample(f"{i:05d}", ids, is_image, pixels) for i, ids in enumerate(made)]
        return [ready[i : i + self.micro_batch] for i in range(0, samples, self.micro_batch)]


class Weights:
    """Random weights by published name; each is drawn when asked for, from a seed of its name."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.shapes = setting.decoder.shapes(FAMILY.parameter_map)
        self.device = device

    def slices(self, name: str) -> torch.Tensor:
        """The tensor, in bf16."""
        seed = zlib.crc32(name.encode())
        return _noise(name, self.shapes[name], torch.Generator(self.device).manual_seed(seed))


class Features(torch.nn.Module):
    """In the tower's place: features that were drawn before, the same for every image."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        super().__init__()
        made = torch.randn(
            IMAGE_TOKENS, setting.decoder.hidden, generator=torch.Generator().manual_seed(0)
        )
        self.drawn = torch.nn.Parameter(made.to(device, torch.bfloat16), requires_grad=False)

    def forward(self, pixels: ImageInputs) -> torch.Tensor:
        """[tokens,H] of all images."""
        return self.drawn.repeat(len(pixels.pixel_values), 1)


@dataclass(frozen=True)
class Case:
    """Something to measure: `prepare` makes what `act` works on; only `act` is timed.

    act returns how many of its seconds went into reading and writing files.
    """

    what: str
    samples: int
    prepare: Callable[[], Any]
    act: Callable[[Any], float]


@dataclass(frozen=True)
class Run:
    """seconds and, of these, files: of the slowest rank; peaks: GB at most on each GPU.

    failed: the error that ended it, else "".
    """

    seconds: float = 0.0
    files: float = 0.0
    peaks: tuple[float, ...] = ()
    failed: str = ""


class Clock:
    """Times cases on the devices of this rank and on its peers."""

    def __init__(self, devices: Sequence[torch.device], own: ParallelContext | None) -> None:
        self.own = own
        self.gpus = [device for device in devices if device.type == "cuda"]

    def gather(self, value: Any) -> list[Any]:
        """One value of each rank."""
        return [value] if self.own is None else self.own.gather(value)

    def wait(self) -> None:
        """Until the GPUs have done what they were asked."""
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)

    def tidy(self) -> None:
        """Give back the memory of what is gone."""
        gc.collect()
        if self.gpus:
            torch.cuda.empty_cache()

    def run(self, case: Case) -> Run:
        """Run a case once. One that fails leaves the others their turn."""
        try:
            mine = self._run(case)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            mine = Run(failed=f"{type(error).__name__}: {lines[0][:200]}")
        self.tidy()
        runs: list[Run] = self.gather(mine)
        return Run(
            max(run.seconds for run in runs),
            max(run.files for run in runs),
            tuple(peak for run in runs for peak in run.peaks),
            next((run.failed for run in runs if run.failed), ""),
        )

    def _run(self, case: Case) -> Run:
        subject = case.prepare()
        self.tidy()
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self.wait()
        if self.own is not None:
            self.own.barrier()
            self.wait()
        start = time.perf_counter()
        files = case.act(subject)
        self.wait()
        seconds = time.perf_counter() - start
        peaks = tuple(torch.cuda.max_memory_allocated(gpu) / 1e9 for gpu in self.gpus)
        return Run(seconds, files, peaks)


class Numbers:
    """A file with a line of JSON for every number, written as soon as there is one."""

    def __init__(self, path: Path, point: str, writes: bool = True) -> None:
        self.path, self.point, self.writes = path, point, writes

    def add(self, kind: str, **values: Any) -> None:
        """A line; only the first rank writes."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "point": self.point, **values}) + "\n")

    def add_run(self, case: Case, run: Run) -> None:
        """A run of a case, or why it failed."""
        kind = "failed" if run.failed else "run"
        self.add(kind, what=case.what, samples=case.samples, **asdict(run))


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 product, the best of five."""
    side, count = (8192, 10) if device.type == "cuda" else (1024, 2)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply(_: Any) -> float:
        for _ in range(count):
            a @ b
        return 0.0

    clock, case = Clock([device], None), Case("product", 0, lambda: None, multiply)
    clock.run(case)  # warms up
    best = min(clock.run(case).seconds for _ in range(5))
    return count * 2 * side**3 / best

"""Engines asked from this environment: a process of TensorRT-LLM's own answers through files."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.targets.trtllm.engine import worker
from nemo_vlm_ptq.targets.trtllm.engine.installation import clean_environment
from nemo_vlm_ptq.workdir.store import read_json

TAIL = 3  # lines that the end of the process is told with


@dataclass(frozen=True)
class Engines:
    """FORMAT/engine/ as its files describe it."""

    folder: Path
    vocab: int  # the first id that stands for an image token
    batch: int
    ranks: int
    context_logits: bool


def read_engines(folder: Path) -> Engines:
    """What trtllm-build wrote of itself into llm/config.json."""
    config = read_json(folder / "llm" / "config.json")
    model, built = config["pretrained_config"], config["build_config"]
    return Engines(
        folder,
        int(model["vocab_size"]),
        int(built["max_batch_size"]),
        int(model["mapping"]["world_size"]),
        bool(built["gather_context_logits"]),
    )


class EngineRuntime:
    """Answers like the independent runtime; its process starts with the first question."""

    def __init__(
        self,
        engines: Engines,
        python: Sequence[str],
        fraction: float,
        stop: Sequence[int],
        tower: Callable[[ImageInputs], torch.Tensor] | None,
    ) -> None:
        self.engines, self.stop, self.tower = engines, list(stop), tower
        script = [*python, worker.__file__, str(engines.folder), str(fraction)]
        mpi = ["mpirun", "--allow-run-as-root", "-n", str(engines.ranks)]
        self.command = script if engines.ranks == 1 else [*mpi, *script]
        self.process: subprocess.Popen[str] | None = None
        self.last: deque[str] = deque(maxlen=TAIL)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def encode(self, pixels: ImageInputs) -> torch.Tensor:
        """Images -> features [image tokens,H], by the vision engine where it gives those."""
        if self.tower is not None:
            return self.tower(pixels)
        views = pixels.pixel_values.unbind()
        return torch.cat([self._ask("look", {"pixels0": view[None]}, 1)[0] for view in views])

    def generate(
        self,
        samples: Sequence[Sample],
        features: Sequence[torch.Tensor | None],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """New token ids of each sample, greedy, up to the stop token."""
        out: list[list[int]] = []
        for start in range(0, len(samples), self.engines.batch):
            part = slice(start, start + self.engines.batch)
            tensors = self._prompts(samples[part], features[part])
            rows = self._ask("answer", tensors, len(samples[part]), max_new_tokens)
            out += [self._cut(row.tolist()) for row in rows]
        return out

    def logits(self, sample: Sample, feature: torch.Tensor | None) -> torch.Tensor:
        """Logits [S,V] float32 of one sample, V that of the engine.

        Raises:
            UserError: the engine was built without.
        """
        if not self.engines.context_logits:
            raise UserError(
                f"{self.engines.folder} gives no logits of prompts; remove it and build it with "
                "engine.context_logits=true"
            )
        return self._ask("logits", self._prompts([sample], [feature]), 1)[0]

    def _prompts(
        self, samples: Sequence[Sample], features: Sequence[torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        for i, (sample, feature) in enumerate(zip(samples, features, strict=True)):
            ids = sample.input_ids.clone()
            if feature is not None:
                ids[sample.is_image] = self.engines.vocab + torch.arange(len(feature))
                tensors[f"features{i}"] = feature.float().cpu().contiguous()
            tensors[f"ids{i}"] = ids.int()
        return tensors

    def _cut(self, ids: list[int]) -> list[int]:
        return next((ids[:at] for at, one in enumerate(ids) if one in self.stop), ids)

    def _ask(
        self, do: str, tensors: Mapping[str, torch.Tensor], count: int, tokens: int = 0
    ) -> list[torch.Tensor]:
        """One request to the process: `count` results in order.

        Raises:
            UserError: the process ended; with the last lines that it printed.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="nemo-vlm-ptq-") as place:
            given, result = f"{place}/given", f"{place}/result"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, given)
            request: dict[str, Any] = {"do": do, "count": count, "tokens": tokens}
            request |= {"pad": self.stop[0], "from": given, "to": result}
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended; its last lines say why
            for line in process.stdout:
                if worker.MARK in line:
                    found = load_file(result)
                    return [found[f"out{i}"] for i in range(count)]
                if line.strip():
                    self.last.append(line.strip())
        code = process.wait()
        tail = " | ".join(self.last) or "nothing"
        raise UserError(f"the engine in {self.engines.folder} ended with code {code}: {tail}")

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                env=clean_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return self.process

"""Run engines from this environment: exchange requests and tensors with a worker process.

The worker runs in TensorRT-LLM's environment. Tensors are exchanged through files, so the two
environments share nothing but safetensors.

Legend: S sequence, H hidden size, V vocabulary.
"""

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

from nemo_vlm_ptq.distributed.launcher import die_with_parent
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.targets.trtllm.engine import worker
from nemo_vlm_ptq.targets.trtllm.engine.installation import clean_environment
from nemo_vlm_ptq.workdir.store import read_json

ERROR_LINES = 3  # last lines of output that an error message quotes


@dataclass(frozen=True)
class EngineInfo:
    """Engines in FORMAT/engine/.

    vocab: vocabulary size; larger ids are image tokens.
    max_batch: requests per call.
    ranks: number of processes that run the engine.
    context_logits: whether the engine returns logits of the prompt.
    """

    folder: Path
    vocab: int
    max_batch: int
    ranks: int
    context_logits: bool


def read_engine_info(folder: Path) -> EngineInfo:
    """Read the settings that trtllm-build wrote to llm/config.json."""
    config = read_json(folder / "llm" / "config.json")
    model, build = config["pretrained_config"], config["build_config"]
    return EngineInfo(
        folder=folder,
        vocab=int(model["vocab_size"]),
        max_batch=int(build["max_batch_size"]),
        ranks=int(model["mapping"]["world_size"]),
        context_logits=bool(build["gather_context_logits"]),
    )


class EngineClient:
    """Engines with the interface of the reference model; the first request starts the worker."""

    def __init__(
        self,
        engine: EngineInfo,
        python: Sequence[str],
        kv_cache_fraction: float,
        eos_token_ids: Sequence[int],
        torch_vision: Callable[[ImageInputs], torch.Tensor] | None,
    ) -> None:
        """Prepare the worker's command line.

        Args:
            engine: the engines.
            python: command line of the interpreter that has tensorrt_llm.
            kv_cache_fraction: fraction of free GPU memory for the KV cache.
            eos_token_ids: ids that end a generated sequence; the first one also pads.
            torch_vision: encodes images if the vision engine does not return image features.
        """
        self.engine, self.eos_token_ids = engine, list(eos_token_ids)
        self.torch_vision = torch_vision
        script = [*python, worker.__file__, str(engine.folder), str(kv_cache_fraction)]
        mpi = ["mpirun", "--allow-run-as-root", "-n", str(engine.ranks)]
        self.command = script if engine.ranks == 1 else [*mpi, *script]
        self.process: subprocess.Popen[str] | None = None
        self.last_lines: deque[str] = deque(maxlen=ERROR_LINES)

    def close(self) -> None:
        """Stop the worker."""
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def encode_images(self, images: ImageInputs) -> torch.Tensor:
        """Encode images to features [image tokens,H], with the vision engine if it returns them."""
        if self.torch_vision is not None:
            return self.torch_vision(images)
        features = [
            self._request(worker.ENCODE, {"pixels0": image[None]}, 1)[0]
            for image in images.pixel_values.unbind()
        ]
        return torch.cat(features)

    def generate(
        self,
        samples: Sequence[Sample],
        features: Sequence[torch.Tensor | None],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Generate new token ids of each sample by greedy decoding, without the end token."""
        generated: list[list[int]] = []
        for start in range(0, len(samples), self.engine.max_batch):
            batch = slice(start, start + self.engine.max_batch)
            tensors = self._prompt_tensors(samples[batch], features[batch])
            count = len(samples[batch])
            sequences = self._request(worker.GENERATE, tensors, count, max_new_tokens)
            generated += [self._truncate_at_eos(ids.tolist()) for ids in sequences]
        return generated

    def logits(self, sample: Sample, feature: torch.Tensor | None) -> torch.Tensor:
        """Compute logits [S,V] float32 of one sample, with the engine's vocabulary size.

        Raises:
            UserError: the engine was built without context logits.
        """
        if not self.engine.context_logits:
            raise UserError(
                f"{self.engine.folder} returns no prompt logits; delete it and build it with "
                "engine.context_logits=true"
            )
        return self._request(worker.LOGITS, self._prompt_tensors([sample], [feature]), 1)[0]

    def _prompt_tensors(
        self, samples: Sequence[Sample], features: Sequence[torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        """Return ids, with image tokens numbered from the vocabulary size, and image features."""
        tensors = {}
        for i, (sample, feature) in enumerate(zip(samples, features, strict=True)):
            ids = sample.input_ids.clone()
            if feature is not None:
                ids[sample.is_image] = self.engine.vocab + torch.arange(len(feature))
                tensors[f"features{i}"] = feature.float().cpu().contiguous()
            tensors[f"ids{i}"] = ids.int()
        return tensors

    def _truncate_at_eos(self, ids: list[int]) -> list[int]:
        ends = (index for index, token in enumerate(ids) if token in self.eos_token_ids)
        return ids[: next(ends, len(ids))]

    def _request(
        self,
        operation: str,
        tensors: Mapping[str, torch.Tensor],
        count: int,
        max_new_tokens: int = 0,
    ) -> list[torch.Tensor]:
        """Send one request to the worker and return its `count` results in order.

        Raises:
            UserError: the worker exited; the message quotes its last lines of output.
        """
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="nemo-vlm-ptq-") as folder:
            inputs, outputs = f"{folder}/inputs", f"{folder}/outputs"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, inputs)
            request: dict[str, Any] = {
                "operation": operation,
                "count": count,
                "max_new_tokens": max_new_tokens,
                "pad_id": self.eos_token_ids[0],
                "inputs": inputs,
                "outputs": outputs,
            }
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # the worker has exited; its output is read below
            for line in process.stdout:
                if worker.DONE in line:
                    results = load_file(outputs)
                    return [results[f"out{i}"] for i in range(count)]
                if line.strip():
                    self.last_lines.append(line.strip())
        code = process.wait()
        output = " | ".join(self.last_lines) or "none"
        raise UserError(
            f"the engine in {self.engine.folder} exited with code {code}; last output: {output}"
        )

    def _start(self) -> subprocess.Popen[str]:
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                env=clean_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=die_with_parent,
            )
        return self.process

"""Part modelopt of benchmarks/calibration.py: mtq.quantize on the same decoder.

modelopt runs on transformers' model and on this package's Megatron-core model, which separates the
speed of the calibration from that of the model.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from calibration_common import (
    FAMILY,
    FORWARD,
    MODELOPT_PRESETS,
    Workload,
    log,
)
from calibration_model import RandomFeatures, RandomWeights, build_random_decoder, run_forward
from calibration_timing import Case
from modelopt.torch.quantization import extensions
from transformers import LlamaForCausalLM

from nemo_vlm_ptq.families.base import IMAGE
from nemo_vlm_ptq.megatron.forward import collate
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext


def start_compiling(device: torch.device) -> threading.Thread:
    """Compile modelopt's CUDA extensions for this GPU in a thread; the first time takes minutes."""

    def load() -> None:
        if device.type == "cuda":
            os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(
                *torch.cuda.get_device_capability(device)
            )
            loaded = [extensions.get_cuda_ext(), extensions.get_cuda_ext_fp8()]
            log(f"modelopt's CUDA extensions: {', '.join(map(str, loaded))}")

    thread = threading.Thread(target=load)
    thread.start()
    return thread


def extensions_loaded() -> bool | None:
    """Return whether modelopt quantizes with its CUDA extensions; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return None not in (extensions.get_cuda_ext(), extensions.get_cuda_ext_fp8())


def make_device_map(layers: int, devices: tuple[torch.device, ...]) -> dict[str, torch.device]:
    """Return module -> device: half of the layers on the first device, the rest on the last."""
    half = -(-layers // 2)
    first, last = devices[0], devices[-1]
    layer_devices = {f"model.layers.{i}": first if i < half else last for i in range(layers)}
    inputs = {"model.embed_tokens": first, "model.rotary_emb": first}
    return inputs | layer_devices | {"model.norm": last, "lm_head": last}


class HuggingFaceModel:
    """transformers' decoder with the random weights, on one device or split by accelerate."""

    def __init__(self, workload: Workload, devices: tuple[torch.device, ...]) -> None:
        self.workload, self.devices = workload, devices
        self.features = RandomFeatures(workload, devices[0]).features

    def build(self) -> Any:
        """Return an unquantized model."""
        device_map = make_device_map(self.workload.layers, self.devices)
        weights = {device: RandomWeights(self.workload, device) for device in self.devices}
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(FAMILY.text_config(self.workload.model_config))
        state_dict = {}
        for published_name in weights[self.devices[0]].shapes:
            name = published_name.removeprefix(FAMILY.decoder_prefix)
            device = next(
                device for module, device in device_map.items() if name.startswith(f"{module}.")
            )
            state_dict[name] = weights[device].get_slice(published_name)
        model.load_state_dict(state_dict, assign=True)
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(model.config).to(self.devices[0])
        model.eval().requires_grad_(False)
        return model if len(self.devices) == 1 else _dispatch(model, device_map)

    @torch.no_grad()
    def forward(self, model: Any, micro_batches: list[Any]) -> None:
        """Run micro-batches through the model."""
        for samples in micro_batches:
            batch = collate(samples)
            embeddings = model.get_input_embeddings()(batch.input_ids.to(self.devices[0]))
            is_image = (batch.modality == IMAGE).to(embeddings.device)
            embeddings[is_image] = self.features.repeat(len(samples), 1)
            model(inputs_embeds=embeddings, use_cache=False)


def _dispatch(model: Any, device_map: dict[str, torch.device]) -> Any:
    """Add accelerate's hooks, which move hidden states between devices."""
    from accelerate import dispatch_model

    accelerate_map = {
        name: device.type if device.index is None else device.index
        for name, device in device_map.items()
    }
    return dispatch_model(model, device_map=accelerate_map, force_hooks=True)


class MegatronModel:
    """This package's Megatron-core model with the random weights."""

    def __init__(self, workload: Workload, parallel: ParallelContext) -> None:
        self.workload, self.parallel = workload, parallel
        self.features = RandomFeatures(workload, parallel.device).features

    def build(self) -> Any:
        """Return an unquantized model."""
        return build_random_decoder(self.parallel, self.workload, self.parallel.device)

    def forward(self, model: Any, micro_batches: list[Any]) -> None:
        """Run micro-batches through the model."""
        run_forward(model, self.parallel, micro_batches, self.features)


def cases(workload: Workload, source: HuggingFaceModel | MegatronModel) -> Iterator[Case]:
    """Yield the forward pass and mtq.quantize with each preset, each on a new model."""
    micro_batches = workload.micro_batches(workload.samples)

    def forward_loop(model: Any) -> None:
        source.forward(model, micro_batches)

    def quantize(preset: str) -> Callable[[Any], float]:
        def run(model: Any) -> float:
            mtq.quantize(model, copy.deepcopy(getattr(mtq, preset)), forward_loop)
            return 0.0

        return run

    def forward(model: Any) -> float:
        forward_loop(model)
        return 0.0

    yield Case(name=FORWARD, samples=workload.samples, setup=source.build, run=forward)
    for name, preset in MODELOPT_PRESETS.items():
        yield Case(name=name, samples=workload.samples, setup=source.build, run=quantize(preset))

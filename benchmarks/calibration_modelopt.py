"""modelopt's part of benchmarks/calibration.py: its own calibration of the same two models."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from calibration_ours import build, run_plainly
from calibration_setting import (
    FAMILY,
    FORWARD,
    PRESETS,
    Case,
    Features,
    Setting,
    Weights,
    log,
)
from modelopt.torch.quantization import extensions
from transformers import LlamaForCausalLM

from nemo_vlm_ptq.families.base import IMAGE
from nemo_vlm_ptq.megatron.forward import collate
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext


def start_compiling(device: torch.device) -> threading.Thread:
    """modelopt's CUDA extensions, which take minutes the first time, for this card alone."""

    def load() -> None:
        if device.type == "cuda":
            os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(
                *torch.cuda.get_device_capability(device)
            )
            found = [extensions.get_cuda_ext(), extensions.get_cuda_ext_fp8()]
            log(f"modelopt's CUDA extensions: {', '.join(map(str, found))}")

    thread = threading.Thread(target=load)
    thread.start()
    return thread


def extensions_loaded() -> bool | None:
    """Whether modelopt rounds with its CUDA extensions; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return None not in (extensions.get_cuda_ext(), extensions.get_cuda_ext_fp8())


def device_map(layers: int, devices: tuple[torch.device, ...]) -> dict[str, torch.device]:
    """Module -> device: the first half of the layers on the first device, the rest on the last."""
    half = -(-layers // 2)
    first, last = devices[0], devices[-1]
    places = {f"model.layers.{i}": first if i < half else last for i in range(layers)}
    ends = {"model.embed_tokens": first, "model.rotary_emb": first}
    return ends | places | {"model.norm": last, "lm_head": last}


class HuggingFace:
    """transformers' decoder with the same weights, on one device or split by accelerate."""

    def __init__(self, setting: Setting, devices: tuple[torch.device, ...]) -> None:
        self.setting, self.devices = setting, devices
        self.features = Features(setting, devices[0]).drawn

    def fresh(self) -> Any:
        """A model that nothing has been done to."""
        places = device_map(self.setting.layers, self.devices)
        weights = {device: Weights(self.setting, device) for device in self.devices}
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(FAMILY.text_config(self.setting.config))
        filled = {}
        for name in weights[self.devices[0]].shapes:
            own = name.removeprefix(FAMILY.decoder_prefix)
            place = next(at for module, at in places.items() if own.startswith(f"{module}."))
            filled[own] = weights[place].slices(name)
        model.load_state_dict(filled, assign=True)
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(model.config).to(self.devices[0])
        model.eval().requires_grad_(False)
        return model if len(self.devices) == 1 else _dispatch(model, places)

    @torch.no_grad()
    def run(self, model: Any, chunks: list[Any]) -> None:
        """Micro-batches through the model."""
        for chunk in chunks:
            batch = collate(chunk)
            embedded = model.get_input_embeddings()(batch.input_ids.to(self.devices[0]))
            places = (batch.modality == IMAGE).to(embedded.device)
            embedded[places] = self.features.repeat(len(chunk), 1)
            model(inputs_embeds=embedded, use_cache=False)


def _dispatch(model: Any, places: dict[str, torch.device]) -> Any:
    """accelerate's hooks, which move what goes from layer to layer."""
    from accelerate import dispatch_model

    named = {
        name: device.type if device.index is None else device.index
        for name, device in places.items()
    }
    return dispatch_model(model, device_map=named, force_hooks=True)


class Megatron:
    """This project's Megatron-core model, as it was imported."""

    def __init__(self, setting: Setting, own: ParallelContext) -> None:
        self.setting, self.own = setting, own
        self.features = Features(setting, own.device).drawn

    def fresh(self) -> Any:
        """A model that nothing has been done to."""
        return build(self.own, self.setting, self.own.device)

    def run(self, model: Any, chunks: list[Any]) -> None:
        """Micro-batches through the model."""
        run_plainly(model, self.own, chunks, self.features)


def cases(setting: Setting, path: HuggingFace | Megatron) -> Iterator[Case]:
    """The plain forward and mtq.quantize with each preset, on fresh models."""
    chunks = setting.chunks(setting.samples)

    def loop(model: Any) -> None:
        path.run(model, chunks)

    def calibrate(preset: str) -> Callable[[Any], float]:
        def act(model: Any) -> float:
            mtq.quantize(model, copy.deepcopy(getattr(mtq, preset)), loop)
            return 0.0

        return act

    def forward(model: Any) -> float:
        loop(model)
        return 0.0

    yield Case(FORWARD, setting.samples, path.fresh, forward)
    for name, preset in PRESETS.items():
        yield Case(name, setting.samples, path.fresh, calibrate(preset))

"""NeMo's form of a model: weights/ out of one of our torch_dist folders, context/ beside it."""

from __future__ import annotations

import io
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.solve.layer import load_scales
from nemo_vlm_ptq.checkpoints.torch_dist_index import Index, read_index, read_object
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_tensor
from nemo_vlm_ptq.context import RunContext, StageOutput
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.families.llava import full_config
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.stacked_checkpoint import StackedEntry, save_stacked
from nemo_vlm_ptq.planning.plan import VOCAB_MULTIPLE
from nemo_vlm_ptq.stages.import_model import VISION_FILE, rank_files
from nemo_vlm_ptq.targets.nemo2 import context as nemo
from nemo_vlm_ptq.targets.nemo2.fiddle import to_json, to_tree
from nemo_vlm_ptq.targets.writing.published import SIDECAR_SUFFIXES, copy_missing
from nemo_vlm_ptq.workdir import store

WEIGHTS, CONTEXT, STATE = "weights", "context", "modelopt_state"
SHARD = "/shard_0_1"
QUANTIZERS = "modelopt_quantizer_state"
LEFT_OUT = ("config.json", "generation_config.json", "model.safetensors.index.json")


def write_nemo(job: RunContext, fmt: QuantFormat | None, folder: Path) -> StageOutput:
    """weights/ and context/ of a format, or of the imported 16 bit model (collective).

    Every rank writes its share of the layers, whole: what is written does not depend on how the
    ranks were laid out.
    """
    parallel = job.parallel
    weights = folder / WEIGHTS
    if parallel.rank == 0:
        weights.mkdir()
    parallel.barrier()
    source = job.folder("megatron") if fmt is None else job.folder(fmt.name, "quantized")
    tensors, objects = _entries(job, fmt, read_index(source))
    save_stacked(tensors, objects, job.plan.decoder.layers, weights)
    names = [f"{WEIGHTS}/{name}" for name in rank_files(weights, parallel.rank)]
    if parallel.rank == 0:
        names += _write_context(job, folder)
        if fmt is not None:
            shutil.copytree(source / STATE, weights / STATE)
            state = (path for path in (weights / STATE).rglob("*") if path.is_file())
            names += [str(path.relative_to(folder)) for path in state]
    return StageOutput(names)


def _entries(
    job: RunContext, fmt: QuantFormat | None, index: Index
) -> tuple[list[StackedEntry], list[StackedEntry]]:
    """This rank's tensors and quantizer states, under NeMo's names."""
    parallel, layers = job.parallel, range(job.plan.decoder.layers)
    mine = {str(layer) for layer in round_robin(layers, parallel.layout.world, parallel.rank)}

    def is_mine(stored: str) -> bool:
        match = re.fullmatch(nemo.LAYER, stored)
        return parallel.rank == 0 if match is None else match[1] in mine

    tensors, objects = [], []
    for stored in sorted(filter(is_mine, index.tensors)):
        name, layer = nemo.decoder_key(stored, stacked=fmt is None)
        tensors.append(StackedEntry(name, _ordered(job, fmt, index, stored), layer))
    for stored in sorted(filter(is_mine, index.objects)):
        name, layer = nemo.decoder_key(stored.removesuffix(SHARD), stacked=fmt is None)
        objects.append(StackedEntry(name, _whole(index, stored), layer))
    if parallel.rank == 0:
        beside = load_file(job.folder("megatron", VISION_FILE))
        carried = {name: one for name, one in beside.items() if "position_ids" not in name}
        tensors += [StackedEntry(nemo.beside_key(name), one) for name, one in carried.items()]
    return tensors, objects


def _ordered(job: RunContext, fmt: QuantFormat | None, index: Index, stored: str) -> torch.Tensor:
    """A tensor; amaxes of rows as the whole weight has them, for ranks store them rank by rank."""
    found = read_tensor(index.tensors[stored])
    match = re.search(r"\.(\d+)\..*\.(\w+)\.weight_quantizer(\.0)?\._amax$", stored)
    if match is None or fmt is None:
        return found
    scales = load_scales(job.folder(fmt.name, "scales"), int(match[1]))[match[2]]
    return scales.weight_amax.reshape(found.shape).to(found.dtype)


def _whole(index: Index, stored: str) -> torch.Tensor | None:
    """A linear's quantizer state with the shapes of the whole linear, not of one rank's part.

    None for a module without quantizers.
    """
    state, linear = read_object(index, stored), stored.removesuffix(f"._extra_state{SHARD}")
    if not state:
        return None
    for name, own in state.get(QUANTIZERS, {}).items():
        for buffer, facts in own["_pytorch_state_metadata"]["buffers"].items():
            kept = index.tensors[f"{linear}.{name}.{buffer}"].shape
            shape = tuple(facts["shape"])
            if shape:
                facts["shape"] = torch.Size((math.prod(kept) // math.prod(shape[1:]), *shape[1:]))
        if "_amax_shape_for_export" in own:
            rows = sum(index.tensors[part].shape[0] for part in _weights_of(index, linear))
            own["_amax_shape_for_export"] = (rows, -1)
    return _pickled(state)


def _weights_of(index: Index, linear: str) -> list[str]:
    names = (f"{linear}.weight", f"{linear}.weight_w", f"{linear}.weight_v")
    return [name for name in names if name in index.tensors]


def _pickled(state: Any) -> torch.Tensor:
    """Bytes as Megatron's modules give them to a checkpoint, uint8 [n]."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _write_context(job: RunContext, folder: Path) -> list[str]:
    """io.json, model.yaml, and the files of tokenizer and image processor."""
    plan, home = job.plan, folder / CONTEXT
    rows = plan.decoder.sizes(VOCAB_MULTIPLE).padded_vocab
    root = nemo.context(full_config(plan.config), plan.decoder, rows, plan.dtype)
    (home / nemo.TOKENIZER).mkdir(parents=True)
    store.write_json(home / "io.json", to_json(root))
    text = yaml.safe_dump(to_tree(root.arguments["model"]), sort_keys=False)
    (home / "model.yaml").write_text(text)

    def wanted(path: Path) -> bool:
        return path.suffix in SIDECAR_SUFFIXES and path.name not in LEFT_OUT

    copied = copy_missing(plan.folder, home / nemo.TOKENIZER, "", wanted)
    own = ["io.json", "model.yaml", *(f"{nemo.TOKENIZER}/{name}" for name in copied)]
    return [f"{CONTEXT}/{name}" for name in own]

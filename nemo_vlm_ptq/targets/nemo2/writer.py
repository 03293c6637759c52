"""Write NeMo 2 checkpoints: weights/ from a torch_dist folder of the workdir, and context/.

Each rank writes whole tensors of its layers, so the files do not depend on the parallel layout.
"""

from __future__ import annotations

import io
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_vlm_ptq.calibrate.solve.layer import load_scales
from nemo_vlm_ptq.checkpoints.model_folder import PROCESSOR_FILES, TOKENIZER_FILES
from nemo_vlm_ptq.checkpoints.torch_dist_index import Index, read_index, read_object
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_tensor
from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.context import RunContext, StageOutput, on_rank_zero
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.families.llava import full_config
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.megatron.stacked_checkpoint import StackedEntry, save_stacked
from nemo_vlm_ptq.sources.decoder_weights import read_vision
from nemo_vlm_ptq.targets.nemo2 import context as nemo
from nemo_vlm_ptq.targets.nemo2.fiddle import to_json, to_tree
from nemo_vlm_ptq.targets.writing.published import copy_missing
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import check_folder
from nemo_vlm_ptq.workdir.files import rank_files

WEIGHTS, CONTEXT, STATE = "weights", "context", "modelopt_state"
OBJECT_SUFFIX = "/shard_0_1"
QUANTIZER_STATE = "modelopt_quantizer_state"


def write(context: RunContext, fmt: QuantFormat | None, folder: Path) -> StageOutput:
    """Write weights/ and context/ of a format, or of the imported 16 bit model (collective)."""
    parallel = context.parallel
    weights = folder / WEIGHTS
    if parallel.rank == 0:
        weights.mkdir()
    parallel.barrier()
    source = context.folder("megatron") if fmt is None else context.folder(fmt.name, "quantized")
    stage = "import" if fmt is None else "export"
    on_rank_zero(parallel, lambda: check_folder(source, stage))
    tensors, objects = _assigned_entries(context, fmt, read_index(source))
    save_stacked(tensors, objects, context.plan.decoder.layers, weights)
    names = [f"{WEIGHTS}/{name}" for name in rank_files(weights, parallel.rank)]
    if parallel.rank == 0:
        names += _write_context(context, folder)
        if fmt is not None:
            shutil.copytree(source / STATE, weights / STATE)
            state = (path for path in (weights / STATE).rglob("*") if path.is_file())
            names += [str(path.relative_to(folder)) for path in state]
    return StageOutput(names)


def _assigned_entries(
    context: RunContext, fmt: QuantFormat | None, index: Index
) -> tuple[list[StackedEntry], list[StackedEntry]]:
    """Return this rank's tensors and quantizer states under NeMo's names."""
    parallel, layers = context.parallel, range(context.plan.decoder.layers)
    world = parallel.layout.world_size
    assigned = {str(layer) for layer in round_robin(layers, world, parallel.rank)}

    def is_assigned(stored: str) -> bool:
        match = re.fullmatch(nemo.LAYER_PATTERN, stored)
        return parallel.rank == 0 if match is None else match[1] in assigned

    tensors, objects = [], []
    for stored in sorted(filter(is_assigned, index.tensors)):
        name, layer = nemo.decoder_key(stored, stacked=fmt is None)
        tensors.append(StackedEntry(name, _read_unsharded(context, fmt, index, stored), layer))
    for stored in sorted(filter(is_assigned, index.objects)):
        name, layer = nemo.decoder_key(stored.removesuffix(OBJECT_SUFFIX), stacked=fmt is None)
        objects.append(StackedEntry(name, _unsharded_state(index, stored), layer))
    if parallel.rank == 0:
        vision = read_vision(context.plan)
        kept = {name: tensor for name, tensor in vision.items() if "position_ids" not in name}
        tensors += [StackedEntry(nemo.vision_key(name), tensor) for name, tensor in kept.items()]
    return tensors, objects


def _read_unsharded(
    context: RunContext, fmt: QuantFormat | None, index: Index, stored: str
) -> torch.Tensor:
    """Read a tensor; per-row amaxes are reordered from rank order to the order of the weight."""
    tensor = read_tensor(index.tensors[stored])
    match = re.search(r"\.(\d+)\..*\.(\w+)\.weight_quantizer(\.0)?\._amax$", stored)
    if match is None or fmt is None:
        return tensor
    scales = load_scales(context.folder(fmt.name, "scales"), int(match[1]))[match[2]]
    return scales.weight_amax.reshape(tensor.shape).to(tensor.dtype)


def _unsharded_state(index: Index, stored: str) -> torch.Tensor | None:
    """Return a linear's quantizer state with the shapes of the unsharded linear.

    None for a module without quantizers.
    """
    state, linear = read_object(index, stored), stored.removesuffix(f"._extra_state{OBJECT_SUFFIX}")
    if not state:
        return None
    for name, quantizer in state.get(QUANTIZER_STATE, {}).items():
        for buffer, metadata in quantizer["_pytorch_state_metadata"]["buffers"].items():
            stored_shape = index.tensors[f"{linear}.{name}.{buffer}"].shape
            shape = tuple(metadata["shape"])
            if shape:
                rows = math.prod(stored_shape) // math.prod(shape[1:])
                metadata["shape"] = torch.Size((rows, *shape[1:]))
        if "_amax_shape_for_export" in quantizer:
            rows = sum(index.tensors[part].shape[0] for part in _weight_names(index, linear))
            quantizer["_amax_shape_for_export"] = (rows, -1)
    return _pickle(state)


def _weight_names(index: Index, linear: str) -> list[str]:
    names = (f"{linear}.weight", f"{linear}.weight_w", f"{linear}.weight_v")
    return [name for name in names if name in index.tensors]


def _pickle(state: Any) -> torch.Tensor:
    """Serialize a state as Megatron's modules do, uint8 [n]."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _write_context(context: RunContext, folder: Path) -> list[str]:
    """Write io.json, model.yaml, and the files of tokenizer and image processor."""
    plan, home = context.plan, folder / CONTEXT
    vocab = plan.decoder.sizes(VOCAB_MULTIPLE).padded_vocab
    root = nemo.trainer_context(full_config(plan.config), plan.decoder, vocab, plan.dtype)
    (home / nemo.TOKENIZER_FOLDER).mkdir(parents=True)
    store.write_json(home / "io.json", to_json(root))
    text = yaml.safe_dump(to_tree(root.arguments["model"]), sort_keys=False)
    (home / "model.yaml").write_text(text)

    def is_sidecar(path: Path) -> bool:
        return path.name in (*TOKENIZER_FILES, *PROCESSOR_FILES)

    copied = copy_missing(plan.folder, home / nemo.TOKENIZER_FOLDER, "", is_sidecar)
    names = ["io.json", "model.yaml", *(f"{nemo.TOKENIZER_FOLDER}/{name}" for name in copied)]
    return [f"{CONTEXT}/{name}" for name in names]

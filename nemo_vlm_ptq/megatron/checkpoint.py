"""Load Hugging Face and torch_dist checkpoints into a Megatron model, and save torch_dist.

Data-parallel ranks share the I/O: each parameter has one writer among them, which also reads it.
"""

from __future__ import annotations

import io
import pickle
import queue
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from nemo_vlm_ptq.checkpoints.torch_dist_index import INDEX, read_index
from nemo_vlm_ptq.checkpoints.torch_dist_tensors import read_block
from nemo_vlm_ptq.megatron.parallel_context import ParallelContext, cores_per_rank
from nemo_vlm_ptq.sources.decoder_weights import DecoderWeights
from nemo_vlm_ptq.utils.pinned_memory import copy_pinned, to_device

LAYER_PREFIX = "decoder.layers."
CPU = torch.device("cpu")
FILE_BYTES = 1 << 29  # target file size; a rank writes its files in parallel, one process per file
READ_THREADS = 4
MIN_FILES, MAX_FILES = 2, 8  # files per rank


def named_global_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters by name, with global instead of stage-local layer indices."""
    first_layer = model.decoder.layers[0].layer_number - 1
    named = {}
    for name, parameter in model.named_parameters():
        if name.startswith(LAYER_PREFIX):
            layer, rest = name.removeprefix(LAYER_PREFIX).split(".", 1)
            name = f"{LAYER_PREFIX}{int(layer) + first_layer}.{rest}"
        named[name] = parameter
    return named


def writer_rank(name: str, data_size: int) -> int:
    """Return the data rank that writes a parameter: round-robin over layers.

    The embedding is written by the first data rank, final norm and output layer by the last.
    """
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return 0 if name.startswith("embedding") else data_size - 1
    return int(layer[1]) % data_size


def is_writer(name: str) -> bool:
    """Return whether this data rank writes a parameter."""
    data_size = parallel_state.get_data_parallel_world_size()
    return writer_rank(name, data_size) == parallel_state.get_data_parallel_rank()


def layer_indices(model: GPTModel) -> set[int]:
    """Return the global indices of a model's layers."""
    return {block.layer_number - 1 for block in model.decoder.layers}


def written_layers(model: GPTModel) -> set[int]:
    """Return the global indices of the layers that this data rank writes."""
    return {layer for layer in layer_indices(model) if is_writer(f"{LAYER_PREFIX}{layer}.")}


def load_from_source(
    model: GPTModel,
    parallel: ParallelContext,
    weights: DecoderWeights,
    *,
    written_only: bool = False,
    for_calibration: bool = False,
) -> int:
    """Load this rank's shards from the source, reading only their slices, in several threads.

    Args:
        model: the model to fill.
        parallel: coordinates of this rank.
        weights: the source's decoder; its device should be the model's.
        written_only: load only the parameters that this data rank writes.
        for_calibration: whether the model was built for calibration.

    Returns:
        Bytes read by this rank.

    Raises:
        UserError: NaN or Inf in a slice, or values outside of the range of the model's dtype.
    """
    parameters = [
        (name, parameter)
        for name, parameter in named_global_parameters(model).items()
        if not written_only or is_writer(name)
    ]
    on_gpu = parallel.device.type == "cuda"
    stream = torch.cuda.current_stream(parallel.device) if on_gpu else None

    def load(item: tuple[str, torch.nn.Parameter]) -> int:
        name, parameter = item
        with torch.cuda.stream(stream):  # no effect for None
            t, T = parallel.tensor_rank, parallel.layout.tensor
            shard = weights.shard(name, t, T, by_output=for_calibration)
            assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
            parameter.data.copy_(shard)
        return shard.nbytes

    with ThreadPoolExecutor(min(READ_THREADS, cores_per_rank())) as threads:
        return sum(threads.map(load, parameters))


def save_model(model: GPTModel, folder: Path) -> None:
    """Write a torch_dist checkpoint; every rank writes shards of its own layers (collective)."""
    state = model.sharded_state_dict()
    data_size = parallel_state.get_data_parallel_world_size()
    data_rank = parallel_state.get_data_parallel_rank()
    apply_factories(state)  # splits gated linears into gate and up, views of one parameter
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            *others, _ = shard.replica_id
            # Replica 0 is the one that is written.
            replica = (data_rank - writer_rank(shard.key, data_size)) % data_size
            shard.replica_id = (*others, replica)
            if shard.data is not None and is_main_replica(shard.replica_id):
                # The writer would pin the memory of all GPU tensors at once, and copy views.
                shard.data = torch.from_dlpack(to_device(shard.data.detach(), CPU))
        elif isinstance(shard, ShardedObject):
            shard.data = _deterministic_pickle(shard.data)
    save_sharded_state(state, folder)


def save_sharded_state(state: dict[str, Any], folder: Path) -> None:
    """Write the sharded state dicts of all ranks as a torch_dist checkpoint (collective).

    Raises:
        RuntimeError: writing failed on a rank; names the ranks and their errors.
    """
    # The default results queue is a manager process, which survives if this process is killed.
    filesystem_async._results_queue = queue.Queue()
    own_bytes = 0
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and shard.data is not None:
            own_bytes += shard.data.nbytes * is_main_replica(shard.replica_id)
    files = min(MAX_FILES, max(MIN_FILES, -(-own_bytes // FILE_BYTES)))
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=files)
    try:
        dist_checkpointing.save(state, str(folder), strategy)
    except CheckpointException as error:  # a BaseException, which callers do not catch
        reasons = {f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()}
        raise RuntimeError("; ".join(sorted(reasons))) from error
    if dist.get_rank() == 0:
        normalize_index(folder)


def normalize_index(folder: Path) -> None:
    """Rewrite .metadata deterministically: without random id and path, sorted by key."""
    path = folder / INDEX
    index = pickle.loads(path.read_bytes())
    index.storage_meta = None
    index.storage_data = dict(sorted(index.storage_data.items(), key=str))
    path.write_bytes(pickle.dumps(index))


def _deterministic_pickle(state: Any) -> Any:
    """Pickle an extra state again with sorted keys: modelopt builds it from unordered sets."""
    if not isinstance(state, torch.Tensor) or not state.numel():
        return state
    buffer = io.BytesIO()
    torch.save(_sort_keys(torch.load(io.BytesIO(state.numpy().tobytes()))), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _sort_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _sort_keys(value[key]) for key in sorted(value, key=str)}


def load_model(model: GPTModel, folder: Path, *, written_only: bool = False) -> None:
    """Load a torch_dist checkpoint, saved in any layout, into a model's parameters (collective).

    Each data rank reads the parameters that it would write, directly into the parameter, and
    broadcasts them to its data-parallel group. megatron-core's loader concatenates gate and up in
    new memory: 5.8 GB of the 13.5 GB of a 7B model.

    Args:
        model: the model to fill.
        folder: the checkpoint.
        written_only: load only the parameters that this data rank writes; not collective.

    Raises:
        UserError: damaged files.
    """
    parameters = named_global_parameters(model)
    own = [parameter for name, parameter in parameters.items() if is_writer(name)]
    stored = read_index(folder).tensors
    own_storage = {parameter.untyped_storage().data_ptr() for parameter in own}
    loaded = 0
    state = model.sharded_state_dict()
    apply_factories(state)
    for shard in nested_values(state):
        if not isinstance(shard, ShardedTensor) or shard.data is None:
            continue
        if shard.data.untyped_storage().data_ptr() in own_storage:
            offset, shape = tuple(shard.global_offset), tuple(shard.local_shape)
            copy_pinned(shard.data.detach(), read_block(stored[shard.key], offset, shape))
            loaded += shard.data.numel()
    assert loaded == sum(parameter.numel() for parameter in own), folder
    group = parallel_state.get_data_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    if written_only or len(ranks) == 1:
        return
    for name, parameter in parameters.items():
        dist.broadcast(parameter.data, ranks[writer_rank(name, len(ranks))], group=group)

"""Runs engines inside TensorRT-LLM's own environment; nothing of this package is imported here.

    python worker.py ENGINE_FOLDER FRACTION       (under mpirun, a process for each rank)

Rank 0 reads a JSON request a line, {"do", "count", "tokens", "pad", "from", "to"}, and answers with
a line that starts with MARK. Tensors go through safetensors files:
    look    pixels0 [1,3,h,w]                       -> out0 [tokens,H]
    answer  ids{i} [S] int32, features{i} [T,H]     -> out{i} new ids
    logits  the same                                -> out{i} [S,V] float32
Image positions of ids count up from the vocabulary's size, as TensorRT-LLM has it.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MARK = "nemo-vlm-ptq answered"


def main() -> None:
    """Serve requests until stdin ends."""
    import tensorrt_llm
    from tensorrt_llm.runtime import ModelRunnerCpp

    folder, fraction = Path(sys.argv[1]), float(sys.argv[2])
    rank = tensorrt_llm.mpi_rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    runner = ModelRunnerCpp.from_dir(
        engine_dir=str(folder / "llm"), rank=rank, kv_cache_free_gpu_memory_fraction=fraction
    )
    tower = None
    for line in sys.stdin if rank == 0 else ():  # the others follow rank 0 by themselves
        request = json.loads(line)
        tensors = load_file(request["from"])
        if request["do"] == "look":
            tower = tower or open_tower(folder / "vision" / "model.engine")
            out = [look(tower, tensors["pixels0"])]
        else:
            out = ask(runner, tensors, request)
        save_file({f"out{i}": one.contiguous().cpu() for i, one in enumerate(out)}, request["to"])
        print(MARK, flush=True)
    tensorrt_llm.mpi_barrier()


def open_tower(path: Path) -> Any:
    """The vision engine."""
    from tensorrt_llm.runtime import Session

    return Session.from_serialized_engine(path.read_bytes())


def look(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [1,3,h,w] -> features [tokens,H]."""
    import tensorrt
    from tensorrt_llm._utils import trt_dtype_to_torch
    from tensorrt_llm.runtime import TensorInfo

    pixels = pixels.half().contiguous().cuda()
    info = tower.infer_shapes([TensorInfo("input", tensorrt.DataType.HALF, pixels.shape)])
    out = {
        one.name: torch.empty(
            tuple(one.shape), dtype=trt_dtype_to_torch(one.dtype), device=pixels.device
        )
        for one in info
    }
    stream = torch.cuda.current_stream()
    if not tower.run({"input": pixels}, out, stream.cuda_stream):
        raise RuntimeError("the vision engine did not run")
    stream.synchronize()
    return out["encoder_output"].flatten(0, 1)


def ask(
    runner: Any, tensors: dict[str, torch.Tensor], request: dict[str, Any]
) -> list[torch.Tensor]:
    """New ids, or logits, of each prompt, greedy; features of all prompts are one padded table."""
    count, logits = request["count"], request["do"] == "logits"
    ids = [tensors[f"ids{i}"] for i in range(count)]
    features = [tensors.get(f"features{i}") for i in range(count)]
    table = None
    if any(one is not None for one in features):
        longest = max(len(one) for one in features if one is not None)
        width = next(one.shape[1] for one in features if one is not None)
        table = torch.zeros(count, longest, width)
        for row, one in zip(table, features, strict=True):
            if one is not None:
                row[: len(one)] = one
    out = runner.generate(
        ids,
        prompt_table=table,
        prompt_tasks=None if table is None else ",".join(map(str, range(count))),
        max_new_tokens=1 if logits else request["tokens"],
        end_id=request["pad"],
        pad_id=request["pad"],
        top_k=1,
        output_sequence_lengths=True,
        return_dict=True,
    )
    if logits:
        return [out["context_logits"][i, : len(one)].float() for i, one in enumerate(ids)]
    ends = out["sequence_lengths"][:, 0].tolist()
    return [out["output_ids"][i, 0, len(one) : ends[i]] for i, one in enumerate(ids)]


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # MPI's own farewell would wait for ranks that wait for this one

"""Run engines inside TensorRT-LLM's environment; imports nothing of this package.

    python worker.py ENGINE_FOLDER KV_CACHE_FRACTION       (one process per rank under mpirun)

Rank 0 reads one JSON request per line, {"operation", "count", "max_new_tokens", "pad_id", "inputs",
"outputs"}, and prints DONE after each. Tensors are read from and written to safetensors files:
    encode    pixels0 [1,3,h,w]                       -> out0 [tokens,H]
    generate  ids{i} [S] int32, features{i} [T,H]     -> out{i} new ids
    logits    the same                                -> out{i} [S,V] float32
Image tokens have the ids vocab_size, vocab_size + 1, ..., as TensorRT-LLM expects.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ENCODE, GENERATE, LOGITS = "encode", "generate", "logits"
DONE = "nemo-vlm-ptq request done"


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
    vision = None
    for line in sys.stdin if rank == 0 else ():  # TensorRT-LLM drives the other ranks
        request = json.loads(line)
        tensors = load_file(request["inputs"])
        if request["operation"] == ENCODE:
            vision = vision or open_vision_engine(folder / "vision" / "model.engine")
            results = [encode_image(vision, tensors["pixels0"])]
        else:
            results = run_decoder(runner, tensors, request)
        outputs = {f"out{i}": result.contiguous().cpu() for i, result in enumerate(results)}
        save_file(outputs, request["outputs"])
        print(DONE, flush=True)
    tensorrt_llm.mpi_barrier()


def open_vision_engine(path: Path) -> Any:
    """Deserialize the vision engine."""
    from tensorrt_llm.runtime import Session

    return Session.from_serialized_engine(path.read_bytes())


def encode_image(vision: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels [1,3,h,w] to features [tokens,H]."""
    import tensorrt
    from tensorrt_llm._utils import trt_dtype_to_torch
    from tensorrt_llm.runtime import TensorInfo

    pixels = pixels.half().contiguous().cuda()
    infos = vision.infer_shapes([TensorInfo("input", tensorrt.DataType.HALF, pixels.shape)])
    outputs = {
        info.name: torch.empty(
            tuple(info.shape), dtype=trt_dtype_to_torch(info.dtype), device=pixels.device
        )
        for info in infos
    }
    stream = torch.cuda.current_stream()
    if not vision.run({"input": pixels}, outputs, stream.cuda_stream):
        raise RuntimeError("the vision engine failed to run")
    stream.synchronize()
    return outputs["encoder_output"].flatten(0, 1)


def run_decoder(
    runner: Any, tensors: dict[str, torch.Tensor], request: dict[str, Any]
) -> list[torch.Tensor]:
    """Return new ids, by greedy decoding, or prompt logits of each prompt.

    Features of all prompts form one padded prompt table [count,tokens,H].
    """
    count, logits = request["count"], request["operation"] == LOGITS
    ids = [tensors[f"ids{i}"] for i in range(count)]
    features = [tensors.get(f"features{i}") for i in range(count)]
    table = None
    if any(feature is not None for feature in features):
        longest = max(len(feature) for feature in features if feature is not None)
        width = next(feature.shape[1] for feature in features if feature is not None)
        table = torch.zeros(count, longest, width)
        for row, feature in zip(table, features, strict=True):
            if feature is not None:
                row[: len(feature)] = feature
    result = runner.generate(
        ids,
        prompt_table=table,
        prompt_tasks=None if table is None else ",".join(map(str, range(count))),
        max_new_tokens=1 if logits else request["max_new_tokens"],
        end_id=request["pad_id"],
        pad_id=request["pad_id"],
        top_k=1,
        output_sequence_lengths=True,
        return_dict=True,
    )
    if logits:
        return [result["context_logits"][i, : len(prompt)].float() for i, prompt in enumerate(ids)]
    ends = result["sequence_lengths"][:, 0].tolist()
    return [result["output_ids"][i, 0, len(prompt) : ends[i]] for i, prompt in enumerate(ids)]


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # MPI finalization would wait for the other ranks

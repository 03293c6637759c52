"""Words that people try in recipes, and the keys and values that they mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Word -> keys that it may mean; the first in the section where it was tried, else the first.
_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("model_path", "model_name", "model_name_or_path", "model_dir", "model_id", "checkpoint",
     "ckpt", "pyt_ckpt_path", "hf_model"): ("model",),
    ("output_dir", "output", "out", "output_path", "export_dir", "export_path", "save_dir",
     "work_dir", "outdir", "dir"): ("workdir",),
    ("samples", "num_samples", "n_samples", "nsamples", "calib_size", "calib_samples", "size",
     "num_calib_samples", "num_calibration_samples", "max_samples"):
        ("calibration.samples", "evaluate.limit"),
    ("data", "dataset", "datasets", "calib_data", "calib_dataset", "calibration_data",
     "data_path", "data_dir", "dataset_path"): ("calibration.data", "evaluate.data"),
    ("batch_size", "batch", "calib_batch_size", "bs", "micro_batch_size", "mbs"):
        ("calibration.micro_batch", "evaluate.batch", "engine.max_batch_size"),
    ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size",
     "inference_tensor_parallel"): ("parallel.tensor", "export.tensor"),
    ("pp", "pp_size", "pipeline_parallel", "pipeline_parallel_size",
     "pipeline_model_parallel_size"): ("parallel.pipeline", "export.pipeline"),
    ("dp", "dp_size", "data_parallel", "data_parallel_size"): ("parallel.data",),
    ("qformat", "format", "formats", "scheme", "quant_algo", "quantization", "precision",
     "algorithm", "quant_format", "recipe", "bits"): ("quantize.format",),
    ("kv_cache_dtype", "kv_cache_qformat", "kv_cache_quant_algo", "kv_cache_format", "kv_dtype",
     "kv_cache_scheme", "kv"): ("quantize.kv_cache",),
    ("awq_block_size", "block_size", "group", "groupsize", "q_group_size"):
        ("quantize.group_size",),
    ("alpha", "smoothing_strength", "smoothquant", "sq_alpha"): ("quantize.smoothquant_alpha",),
    ("dtype", "torch_dtype", "export_dtype"): ("export.dtype",),
    ("target", "export_fmt", "export_format", "backend"): ("export.targets",),
    ("limit", "num_questions"): ("evaluate.limit",),
    ("eval_data", "eval_dataset", "evaluation_data"): ("evaluate.data",),
    ("eval_batch_size",): ("evaluate.batch",),
    ("max_model_len", "max_sequence_length", "seq_len", "seqlen", "max_len"):
        ("engine.max_seq_len",),
    ("text_only",): ("calibration.modality",),
    ("stage", "steps"): ("stages",),
    ("model_type", "architecture"): ("family",),
    ("overrides", "hf_overrides", "config_overrides"): ("config",),
}  # fmt: skip
_SELECTIONS = (
    "ignore", "exclude", "exclude_modules", "ignored_layers", "skip", "skip_layers", "targets",
    "modules_to_not_convert", "include", "layers", "ignore_layers",
)  # fmt: skip
_CANONICAL = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "compressed-tensors": "compressed_tensors",
    "tensorrt_llm": "trtllm",
    "tensorrt-llm": "trtllm",
    "fp8_e4m3": "fp8",
}
_TARGETS = {
    "vllm": "compressed_tensors",
    "sglang": "compressed_tensors",
    "huggingface": "hf",
    "hugging_face": "hf",
    "modelopt": "hf",
    "mcore": "megatron",
    "nemo2": "nemo",
}


def explain_key(key: str, known: Sequence[str]) -> str:
    """Return what to say about an unknown key: the key that it means, if it can be told."""
    section, _, last = key.lower().replace("-", "_").rpartition(".")
    if last in _SELECTIONS and section in ("", "quantize", "export"):
        return (
            "; every linear of the decoder is quantized, and vision tower, projector, embedding "
            "and head stay in 16 bit"
        )
    candidates = [name for words, names in _KEYS.items() if last in words for name in names]
    candidates = candidates or [name for name in known if name.rpartition(".")[2] == last]
    here = [name for name in candidates if section and name.startswith(f"{section}.")]
    candidates = here or candidates or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {candidates[0]!r}?" if candidates else ""


def canonical(value: object) -> object:
    """Return a word of a recipe in lower case, under the name that it has here."""
    if not isinstance(value, str):
        return value
    word = value.lower().removeprefix("torch.")
    return _CANONICAL.get(word, word)


def explain_target(name: str) -> str:
    """Return which target an unknown name means, "" if it cannot be told."""
    meant = _TARGETS.get(name.lower())
    return f"; {name} reads {meant}" if meant else ""

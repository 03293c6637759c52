"""context/ of a NeMo checkpoint against the model: does it build what the weights are for?

It is read as a source would be; what it should say is worked out from the decoder's facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.torch_dist_index import read_index
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import Decoder
from nemo_vlm_ptq.targets.nemo2.source import read_context

VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "image_size", "patch_size")  # fmt: skip


def check_nemo(folder: Path, decoder: Decoder, vision: Any, layer: int, dtype: str) -> list[str]:
    """Problems of context/, and of the dtypes in weights/.

    Args:
        folder: with context/ and weights/ in it.
        decoder: facts of the decoder.
        vision: transformers' config of the tower.
        layer: of the tower that is looked at.
        dtype: of what is not quantized.
    """
    try:
        model = read_context(folder)
        index = read_index(folder / "weights")
    except UserError as error:
        return [str(error)]
    config = model["config"]
    text, tower = config["language_transformer_config"], config["vision_transformer_config"]
    projector = config["vision_projection_config"]
    embedding = index.tensors.get("module.language_model.embedding.word_embeddings.weight")
    wanted = {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaConfig",
        "num_layers": decoder.layers,
        "hidden_size": decoder.hidden,
        "ffn_hidden_size": decoder.ffn,
        "num_attention_heads": decoder.heads,
        "num_query_groups": decoder.kv_heads,
        "kv_channels": decoder.head_dim,
        "layernorm_epsilon": decoder.norm_eps,
        "rotary_base": decoder.rope_theta,
        "seq_length": decoder.max_positions,
        "vocab_size": None if embedding is None else embedding.shape[0],
        "params_dtype": f"torch.{dtype}",
    }
    problems = _differences("language_transformer_config", text, wanted)
    sizes = {name: getattr(vision, name) for name in VISION}
    problems += _differences("vision_transformer_config", tower.get("wrapped", {}), sizes)
    made = {"input_size": vision.hidden_size, "hidden_size": decoder.hidden}
    problems += _differences("vision_projection_config", projector, made)
    problems += _differences("config", config, {"vision_feature_layer": layer})
    name = model["tokenizer"].get("pretrained_model_name")
    if not isinstance(name, str) or not (folder / "context" / name).is_dir():
        problems.append(f"context/io.json: the tokenizer's folder {name!r} is not there")
    amax = ("_amax", "_pre_quant_scale")
    for stored, entry in index.tensors.items():
        if not stored.endswith(amax) and str(entry.dtype) != f"torch.{dtype}":
            problems.append(f"{stored} is {entry.dtype}, not torch.{dtype}")
    return problems


def _differences(where: str, have: Any, wanted: dict[str, Any]) -> list[str]:
    return [
        f"context/io.json: {where}.{key} is {have.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if have.get(key) != value
    ]

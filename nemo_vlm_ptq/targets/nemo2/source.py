"""A NeMo 2 checkpoint of a Llava as a source: its config and tensors as Hugging Face has them.

context/io.json says, as Fiddle does, how NeMo builds the model; it is read as data, and nothing of
it is imported or called. Sizes that it leaves to NeMo's defaults follow from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import SourceTensor, read_json_object
from nemo_vlm_ptq.checkpoints.torch_dist_index import Index, read_index
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.shared import load_tokenizer, require_values
from nemo_vlm_ptq.targets.nemo2 import source_weights as nemo_weights

MODEL = "LlavaModel"
HEADS = {"LlamaConfig": None, "Llama2Config7B": 32, "Llama2Config13B": 40}
DEFAULT_TEXT = {"Llava15Config7B": "Llama2Config7B", "Llava15Config13B": "Llama2Config13B"}
# What the family's rows and decoder stand for: NeMo's defaults.
FIXED = {
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": True,
    "layernorm_zero_centered_gamma": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "share_embeddings_and_output_weights": False,
}
TARGET = "_target_"
HEAD_OF_CLIP = 64  # features of a head in every CLIP tower that OpenAI published


@dataclass(frozen=True)
class NemoSource:
    """A checkpoint as the llava family takes it; folder: of tokenizer and image processor."""

    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    folder: Path


def is_nemo(folder: Path) -> bool:
    """The folder is a NeMo 2 checkpoint."""
    return (folder / "context" / "io.json").is_file() and not (folder / "config.json").exists()


def open_nemo(folder: Path) -> NemoSource:
    """Config and places of tensors of a checkpoint; reads no weights.

    Raises:
        UserError: another model, a quantized one, or one that the llava family cannot hold.
    """
    model = read_context(folder)
    name = _class(model)
    if name != MODEL:
        raise UserError(f"{folder} is NeMo's {name or 'unknown model'}; supported: {MODEL}")
    config = model.get("config") or {}
    index = read_index(folder / "weights")
    quantized = [one for one in index.tensors if "_quantizer." in one]
    if quantized or (folder / "weights" / "modelopt_state").exists():
        raise UserError(f"{folder} is quantized already; a model to quantize is in 16 bit")
    home = _tokenizer_folder(folder, model)
    text = _text(folder, config, index)
    vision = _vision(folder, config, index)
    require_values(
        "llava", {"drop_vision_class_token": (config.get("drop_vision_class_token", True), True)}
    )
    tokens = load_tokenizer(home)
    image = tokens.get_vocab().get("<image>")
    if image is None:
        raise UserError(f"{home} has no token <image>; a Llava's tokenizer has one")
    text |= {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    whole = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "image_token_index": image,
        "pad_token_id": tokens.pad_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": config.get("vision_feature_layer", -2),
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": vision,
    }
    return NemoSource(whole, nemo_weights.list_tensors(folder, index, whole), home)


def read_context(folder: Path) -> dict[str, Any]:
    """How NeMo builds the model: nested arguments, the called name under `_target_`.

    Raises:
        UserError: context/io.json is not what Fiddle writes.
    """
    path = folder / "context" / "io.json"
    content = read_json_object(path)
    try:
        tree = _resolve(content["root"], content["objects"], 0)
        return tree.get("model", tree)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{path} is no configuration as Fiddle writes it") from None


def _resolve(value: Any, objects: Mapping[str, Any], depth: int) -> Any:
    """A value of the JSON with its references followed."""
    if depth > 50:
        raise KeyError("references go round")
    if not isinstance(value, dict):
        return value
    if value["type"] == "ref":
        return _resolve(objects[value["key"]], objects, depth + 1)
    if value["type"] == "leaf":
        return value["value"]
    if value["type"] == "pyref":
        return f"{value['module']}.{value['name']}"
    items = [(key, _resolve(one, objects, depth + 1)) for key, one in value["items"]]
    named = {match[1]: one for key, one in items if (match := re.search(r"='(\w+)'\)$", key))}
    about = _resolve(value["metadata"], objects, depth + 1) if value["metadata"] else {}
    if isinstance(about, dict) and "fn_or_cls" in about:
        return {TARGET: about["fn_or_cls"]} | named
    return named if named else [one for _, one in items]


def _class(call: Any) -> str:
    return call.get(TARGET, "").rpartition(".")[2] if isinstance(call, dict) else ""


def _tokenizer_folder(folder: Path, model: Mapping[str, Any]) -> Path:
    """The folder of context/ that the tokenizer is read from."""
    call = model.get("tokenizer")
    name = call.get("pretrained_model_name") if isinstance(call, dict) else None
    if isinstance(name, str) and (folder / "context" / name).is_dir():
        return folder / "context" / name
    home = folder / "context" / "tokenizer"
    if not home.is_dir():
        raise UserError(
            f"{folder}/context has no folder of the tokenizer; copy the files of the Hugging Face "
            f"model's tokenizer and image processor to {home}"
        )
    return home


def _text(folder: Path, config: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """LlamaConfig of the decoder, what io.json leaves out by NeMo's defaults and the weights."""
    given = config.get("language_transformer_config") or {}
    kind = _class(given) or DEFAULT_TEXT.get(_class(config), "")
    if kind not in HEADS:
        known = ", ".join(HEADS)
        raise UserError(f"{folder}: decoder {kind or 'unknown'} is not supported; known: {known}")
    require_values(
        "llava", {name: (given.get(name, value), value) for name, value in FIXED.items()}
    )
    rows, hidden = nemo_weights.shape_of(folder, index, nemo_weights.EMBEDDING)
    layers = nemo_weights.count_layers(index)
    heads = given.get("num_attention_heads") or HEADS[kind]
    if heads is None:
        raise UserError(f"{folder}/context/io.json does not say num_attention_heads")
    kv_heads = given.get("num_query_groups")
    if kv_heads is None:
        kv_heads = heads
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": nemo_weights.ffn(folder, index),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": given.get("kv_channels") or hidden // heads,
        "rms_norm_eps": given.get("layernorm_epsilon", 1e-5),
        "rope_theta": float(given.get("rotary_base", 10000)),
        "max_position_embeddings": given.get("seq_length", 4096),
        "vocab_size": rows,
        "tie_word_embeddings": False,
    }


def _vision(folder: Path, config: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """CLIPVisionConfig of the tower; NeMo's own classes name a hub model or no sizes at all."""
    given = config.get("vision_transformer_config") or {}
    given = given.get("wrapped") or given
    found = nemo_weights.tower_sizes(folder, index)
    heads = given.get("num_attention_heads") or found["hidden_size"] // HEAD_OF_CLIP
    told = ("hidden_act", "layer_norm_eps", "projection_dim")
    return {
        "model_type": "clip_vision_model",
        "num_attention_heads": heads,
        **found,
        **{name: given[name] for name in told if name in given},
    }

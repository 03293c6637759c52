"""Open a NeMo 2 checkpoint of Llava as a source: config and tensors as Hugging Face names them.

context/io.json is Fiddle's serialization of the calls that build the model. It is read as data;
nothing in it is imported or called. Sizes that it leaves to NeMo's defaults come from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import SourceTensor, read_json_object
from nemo_vlm_ptq.checkpoints.model_folder import check_file, check_model_folder
from nemo_vlm_ptq.checkpoints.torch_dist_index import Index, read_index
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.config_checks import require_values
from nemo_vlm_ptq.families.folder_files import load_tokenizer
from nemo_vlm_ptq.sources import nemo2_weights

MODEL_CLASS = "LlavaModel"
# Supported decoder config classes -> default number of attention heads.
DECODER_HEADS = {"LlamaConfig": None, "Llama2Config7B": 32, "Llama2Config13B": 40}
DEFAULT_DECODERS = {"Llava15Config7B": "Llama2Config7B", "Llava15Config13B": "Llama2Config13B"}
# Decoder settings that the llava family supports, all NeMo's defaults.
REQUIRED_SETTINGS = {
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
TARGET = "_target_"  # key of the callable's name
CLIP_HEAD_DIM = 64  # of all CLIP towers that OpenAI published
MAX_REFERENCE_DEPTH = 50


@dataclass(frozen=True)
class NemoSource:
    """Checkpoint in the form that the llava family expects.

    config: contents of an equivalent Hugging Face config.json.
    tensors: by published name.
    folder: of tokenizer and image processor.
    """

    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    folder: Path


def open_nemo(folder: Path) -> NemoSource:
    """Read the config and the index of a checkpoint, but no weights.

    Raises:
        UserError: the model is not a Llava, is quantized, or has unsupported settings.
    """
    check_file(folder / "context" / "io.json", folder)
    model = read_context(folder)
    name = _class_name(model)
    if name != MODEL_CLASS:
        raise UserError(
            f"{folder}: unsupported NeMo model {name or 'without a class'}; supported: "
            f"{MODEL_CLASS}"
        )
    config = model.get("config") or {}
    for path in sorted((folder / "weights").glob("*")):
        if path.suffix == ".distcp" or path.name == ".metadata":
            check_file(path, folder)
    index = read_index(folder / "weights")
    quantized = [stored for stored in index.tensors if "_quantizer." in stored]
    if quantized or (folder / "weights" / "modelopt_state").exists():
        raise UserError(f"{folder} is already quantized; the source model must be in 16 bit")
    tokenizer_folder = _tokenizer_folder(folder, model)
    check_model_folder(folder, (str(tokenizer_folder.relative_to(folder)),))
    text = _text_config(folder, config, index)
    vision = _vision_config(folder, config, index)
    require_values(
        "llava", {"drop_vision_class_token": (config.get("drop_vision_class_token", True), True)}
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    image_token = tokenizer.get_vocab().get("<image>")
    if image_token is None:
        raise UserError(f"{tokenizer_folder}: the tokenizer must have the token <image>")
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    hf_config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "image_token_index": image_token,
        "pad_token_id": tokenizer.pad_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": config.get("vision_feature_layer", -2),
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": vision,
    }
    tensors = nemo2_weights.list_tensors(folder, index, hf_config)
    return NemoSource(config=hf_config, tensors=tensors, folder=tokenizer_folder)


def read_context(folder: Path) -> dict[str, Any]:
    """Read how NeMo builds the model: nested arguments, with the callable's name as `_target_`.

    Raises:
        UserError: context/io.json is not a Fiddle serialization.
    """
    path = folder / "context" / "io.json"
    content = read_json_object(path)
    try:
        tree = _resolve(content["root"], content["objects"], 0)
        return tree.get("model", tree)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{path} is not a configuration serialized by Fiddle") from None


def _resolve(value: Any, objects: Mapping[str, Any], depth: int) -> Any:
    """Return a value of the serialization with its references followed."""
    if depth > MAX_REFERENCE_DEPTH:
        raise KeyError("references are circular")
    if not isinstance(value, dict):
        return value
    if value["type"] == "ref":
        return _resolve(objects[value["key"]], objects, depth + 1)
    if value["type"] == "leaf":
        return value["value"]
    if value["type"] == "pyref":
        return f"{value['module']}.{value['name']}"
    items = [(key, _resolve(item, objects, depth + 1)) for key, item in value["items"]]
    named = {match[1]: item for key, item in items if (match := re.search(r"='(\w+)'\)$", key))}
    metadata = _resolve(value["metadata"], objects, depth + 1) if value["metadata"] else {}
    if isinstance(metadata, dict) and "fn_or_cls" in metadata:
        return {TARGET: metadata["fn_or_cls"]} | named
    return named if named else [item for _, item in items]


def _class_name(call: Any) -> str:
    return call.get(TARGET, "").rpartition(".")[2] if isinstance(call, dict) else ""


def _tokenizer_folder(folder: Path, model: Mapping[str, Any]) -> Path:
    """Return the folder in context/ that holds the tokenizer."""
    call = model.get("tokenizer")
    name = call.get("pretrained_model_name") if isinstance(call, dict) else None
    if isinstance(name, str) and (folder / "context" / name).is_dir():
        return folder / "context" / name
    default = folder / "context" / "tokenizer"
    if not default.is_dir():
        raise UserError(
            f"{folder}/context has no tokenizer folder; copy tokenizer and image processor files "
            f"of the Hugging Face model to {default}"
        )
    return default


def _text_config(folder: Path, config: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """Return transformers' LlamaConfig of the decoder, completed by NeMo's defaults and weights."""
    settings = config.get("language_transformer_config") or {}
    name = _class_name(settings) or DEFAULT_DECODERS.get(_class_name(config), "")
    if name not in DECODER_HEADS:
        raise UserError(
            f"{folder}: unsupported decoder {name or 'without a class'}; supported: "
            f"{', '.join(DECODER_HEADS)}"
        )
    require_values(
        "llava",
        {key: (settings.get(key, value), value) for key, value in REQUIRED_SETTINGS.items()},
    )
    vocab, hidden = nemo2_weights.shape_of(folder, index, nemo2_weights.EMBEDDING)
    heads = settings.get("num_attention_heads") or DECODER_HEADS[name]
    if heads is None:
        raise UserError(f"{folder}/context/io.json: num_attention_heads is missing")
    kv_heads = settings.get("num_query_groups")
    if kv_heads is None:
        kv_heads = heads
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": nemo2_weights.ffn_size(folder, index),
        "num_hidden_layers": nemo2_weights.count_layers(index),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": settings.get("kv_channels") or hidden // heads,
        "rms_norm_eps": settings.get("layernorm_epsilon", 1e-5),
        "rope_theta": float(settings.get("rotary_base", 10000)),
        "max_position_embeddings": settings.get("seq_length", 4096),
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


def _vision_config(folder: Path, config: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """Return transformers' CLIPVisionConfig; NeMo's config names a Hub model or lacks sizes."""
    settings = config.get("vision_transformer_config") or {}
    settings = settings.get("wrapped") or settings
    sizes = nemo2_weights.tower_sizes(folder, index)
    heads = settings.get("num_attention_heads") or sizes["hidden_size"] // CLIP_HEAD_DIM
    optional = ("hidden_act", "layer_norm_eps", "projection_dim")
    return {
        "model_type": "clip_vision_model",
        "num_attention_heads": heads,
        **sizes,
        **{name: settings[name] for name in optional if name in settings},
    }

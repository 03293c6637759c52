"""Check context/ of a NeMo 2 checkpoint: it must build the model that the weights belong to.

The expected values come from the decoder's shape and the source's vision config.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_vlm_ptq.checkpoints.torch_dist_index import read_index
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import Decoder
from nemo_vlm_ptq.families.llava import full_config
from nemo_vlm_ptq.sources.nemo2 import read_context
from nemo_vlm_ptq.targets.checking import Check, ExpectedQuantization

if TYPE_CHECKING:
    from nemo_vlm_ptq.planning.plan import Plan

VISION_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size",
)  # fmt: skip
QUANTIZER_BUFFERS = ("_amax", "_pre_quant_scale")  # suffixes of tensors in their own dtypes


def check(folder: Path, plan: Plan, expected: ExpectedQuantization) -> Iterator[Check]:
    """Yield the checks of one checkpoint folder."""
    source = full_config(plan.config)
    findings = check_context(
        folder,
        decoder=plan.decoder,
        vision=source.vision_config,
        vision_feature_layer=source.vision_feature_layer,
        dtype=plan.dtype,
    )
    yield Check(
        name="configs", findings=findings, about="configs describe the source in this format"
    )


def check_context(
    folder: Path, decoder: Decoder, vision: Any, vision_feature_layer: int, dtype: str
) -> list[str]:
    """Return the findings about context/ and about the dtypes in weights/.

    Args:
        folder: with context/ and weights/.
        decoder: shape of the decoder.
        vision: transformers' config of the vision tower.
        vision_feature_layer: layer of the tower whose hidden states are the image features.
        dtype: of tensors that are not quantized.
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
    expected_text = {
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
    findings = _differences("language_transformer_config", text, expected_text)
    expected_tower = {name: getattr(vision, name) for name in VISION_SIZES}
    findings += _differences("vision_transformer_config", tower.get("wrapped", {}), expected_tower)
    expected_projector = {"input_size": vision.hidden_size, "hidden_size": decoder.hidden}
    findings += _differences("vision_projection_config", projector, expected_projector)
    findings += _differences("config", config, {"vision_feature_layer": vision_feature_layer})
    tokenizer = model["tokenizer"].get("pretrained_model_name")
    if not isinstance(tokenizer, str) or not (folder / "context" / tokenizer).is_dir():
        findings.append(f"context/io.json: tokenizer folder {tokenizer!r} does not exist")
    for name, stored in index.tensors.items():
        if not name.endswith(QUANTIZER_BUFFERS) and str(stored.dtype) != f"torch.{dtype}":
            findings.append(f"tensor {name} must be torch.{dtype}, got {stored.dtype}")
    return findings


def _differences(section: str, actual: Any, expected: dict[str, Any]) -> list[str]:
    return [
        f"context/io.json: {section}.{key} must be {value!r}, got {actual.get(key)!r}"
        for key, value in expected.items()
        if actual.get(key) != value
    ]

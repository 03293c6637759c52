"""Names of the weights in a NeMo 2 checkpoint, and the contents of its context/.

LlavaModel of NeMo 2.7.3 holds a Megatron decoder, transformers' CLIP tower and a projector of two
linears. The weights are a torch_dist checkpoint; context/io.json describes in Fiddle's format how
to build the model. NeMo is not required to write either.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.targets.nemo2.fiddle import Call, Symbol

TOKENIZER_FOLDER = "tokenizer"  # in context/
DECODER_PREFIX, TOWER_PREFIX, PROJECTOR_PREFIX = (
    "module.language_model.",
    "module.vision_model.",
    "module.",
)
LAYER_PATTERN = r"decoder\.layers\.(\d+)\.(.*)"
LLAVA = "nemo.collections.vlm.neva.model.llava"
VISION = "nemo.collections.vlm.vision.base"
# (pattern of a published name, NeMo's replacement); the tower is transformers' own module.
VISION_NAMES = (
    (r"vision_tower\.", TOWER_PREFIX),
    (r"multi_modal_projector\.linear_1\.", f"{PROJECTOR_PREFIX}vision_projection.0."),
    (r"multi_modal_projector\.linear_2\.", f"{PROJECTOR_PREFIX}vision_projection.2."),
)
# Sizes that NeMo's HFCLIPVisionConfig does not accept as arguments; see _tower.
TOWER_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "projection_dim", "hidden_act", "layer_norm_eps",
)  # fmt: skip


def decoder_key(stored: str, stacked: bool) -> tuple[str, int | None]:
    """Return NeMo's name of a Megatron decoder tensor, and the layer index if layers are stacked.

    A 16 bit checkpoint stacks its layers; a model restored by ModelOpt loads each separately.
    """
    match = re.fullmatch(LAYER_PATTERN, stored)
    if match is None or not stacked:
        return DECODER_PREFIX + stored, None
    return f"{DECODER_PREFIX}decoder.layers.{match[2]}", int(match[1])


def vision_key(published: str) -> str:
    """Return NeMo's name of a tensor of vision tower or projector."""
    for pattern, prefix in VISION_NAMES:
        name, count = re.subn(f"^{pattern}", prefix, published)
        if count:
            return name
    raise AssertionError(published)


def trainer_context(config: Any, decoder: Decoder, vocab_rows: int, dtype: str) -> Call:
    """Return the call that builds NeMo's TrainerContext with model and tokenizer.

    Args:
        config: transformers' LlavaConfig.
        decoder: shape of the decoder.
        vocab_rows: rows of embedding and head, with padding.
        dtype: of the weights.
    """
    model = Call(
        Symbol(LLAVA, "LlavaModel"),
        {
            "config": _llava(config, decoder, vocab_rows, dtype),
            "tokenizer": Call(
                Symbol("nemo.collections.common.tokenizers.huggingface.auto_tokenizer",
                       "AutoTokenizer"),
                {"pretrained_model_name": TOKENIZER_FOLDER},
            ),
        },
    )  # fmt: skip
    trainer = Symbol("nemo.lightning.io.pl", "TrainerContext")
    return Call(trainer, {"model": model, "trainer": None})


def _llava(config: Any, decoder: Decoder, vocab_rows: int, dtype: str) -> Call:
    dtypes = {
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": Symbol("torch", dtype),
        "pipeline_dtype": Symbol("torch", dtype),
    }
    text = Call(
        Symbol("nemo.collections.llm.gpt.model.llama", "LlamaConfig"),
        {
            "num_layers": decoder.layers,
            "hidden_size": decoder.hidden,
            "ffn_hidden_size": decoder.ffn,
            "num_attention_heads": decoder.heads,
            "num_query_groups": decoder.kv_heads,
            "kv_channels": decoder.head_dim,
            "layernorm_epsilon": decoder.norm_eps,
            "rotary_base": int(decoder.rope_theta),
            "seq_length": decoder.max_positions,
            "vocab_size": vocab_rows,
            "apply_rope_fusion": False,  # True requires TransformerEngine to read io.json
            **dtypes,
        },
    )
    projector = Call(
        Symbol(VISION, "MultimodalProjectorConfig"),
        {
            "input_size": config.vision_config.hidden_size,
            "hidden_size": decoder.hidden,
            "ffn_hidden_size": decoder.hidden,
            **dtypes,
        },
    )
    return Call(
        Symbol(LLAVA, "LlavaConfig"),
        {
            "language_transformer_config": text,
            "vision_transformer_config": _tower(config.vision_config),
            "vision_projection_config": projector,
            "vision_feature_layer": config.vision_feature_layer,
            **dtypes,
        },
    )


def _tower(vision: Any) -> Call:
    """Return the call that builds the config of the vision tower.

    NeMo's class accepts only hidden_size, or a Hub name whose weights it downloads. Fiddle can only
    call functions, so functools.update_wrapper sets the other sizes as attributes.
    """
    sizes = {name: getattr(vision, name) for name in TOWER_SIZES}
    tokens = (vision.image_size // vision.patch_size) ** 2
    attributes = sizes | {"num_image_embeddings_per_tile": tokens}
    config = Call(Symbol(VISION, "HFCLIPVisionConfig"), {"hidden_size": vision.hidden_size})
    return Call(
        Symbol("functools", "update_wrapper"),
        {
            "wrapper": config,
            "wrapped": Call(Symbol("argparse", "Namespace"), attributes),
            "assigned": tuple(attributes),
            "updated": (),
        },
    )

"""What NeMo 2 wants to know of a checkpoint: names of its weights, and what context/ says.

NeMo 2.7.3's LlavaModel holds Megatron's decoder, transformers' CLIP tower and a projector of two
linears. Its weights are torch_dist; io.json beside them says, as Fiddle does, how the model is
built. NeMo is not needed to write either.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.targets.nemo2.fiddle import Call, Symbol

TOKENIZER = "tokenizer"  # folder in context/
DECODER, TOWER, PROJECTOR = "module.language_model.", "module.vision_model.", "module."
LAYER = r"decoder\.layers\.(\d+)\.(.*)"
LLAVA = "nemo.collections.vlm.neva.model.llava"
VISION = "nemo.collections.vlm.vision.base"
# Published names beside the decoder and NeMo's; the tower is transformers' own.
BESIDE = (
    (r"vision_tower\.", TOWER),
    (r"multi_modal_projector\.linear_1\.", f"{PROJECTOR}vision_projection.0."),
    (r"multi_modal_projector\.linear_2\.", f"{PROJECTOR}vision_projection.2."),
)
# Of a tower, what NeMo's own config class does not take: given to it once it is made.
TOWER_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size", "projection_dim", "hidden_act", "layer_norm_eps",
)  # fmt: skip


def decoder_key(stored: str, stacked: bool) -> tuple[str, int | None]:
    """NeMo's name of what Megatron stores of one layer, and the layer, if it is stacked.

    A 16 bit model has its layers stacked; one that modelopt has restored asks for each by itself.
    """
    match = re.fullmatch(LAYER, stored)
    if match is None or not stacked:
        return DECODER + stored, None
    return f"{DECODER}decoder.layers.{match[2]}", int(match[1])


def beside_key(published: str) -> str:
    """NeMo's name of a tensor of tower or projector."""
    for pattern, start in BESIDE:
        name, found = re.subn(f"^{pattern}", start, published)
        if found:
            return name
    raise AssertionError(published)


def context(config: Any, decoder: Decoder, rows: int, dtype: str) -> Call:
    """The call that makes NeMo's TrainerContext, model and tokenizer.

    Args:
        config: transformers' LlavaConfig.
        decoder: facts of the decoder.
        rows: of the embedding and the head, padding included.
        dtype: of the weights.
    """
    model = Call(
        Symbol(LLAVA, "LlavaModel"),
        {
            "config": _llava(config, decoder, rows, dtype),
            "tokenizer": Call(
                Symbol("nemo.collections.common.tokenizers.huggingface.auto_tokenizer",
                       "AutoTokenizer"),
                {"pretrained_model_name": TOKENIZER},
            ),
        },
    )  # fmt: skip
    trainer = Symbol("nemo.lightning.io.pl", "TrainerContext")
    return Call(trainer, {"model": model, "trainer": None})


def _llava(config: Any, decoder: Decoder, rows: int, dtype: str) -> Call:
    numbers = {
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
            "vocab_size": rows,
            "apply_rope_fusion": False,  # with it, io.json could not be read without TE
            **numbers,
        },
    )
    projector = Call(
        Symbol(VISION, "MultimodalProjectorConfig"),
        {
            "input_size": config.vision_config.hidden_size,
            "hidden_size": decoder.hidden,
            "ffn_hidden_size": decoder.hidden,
            **numbers,
        },
    )
    return Call(
        Symbol(LLAVA, "LlavaConfig"),
        {
            "language_transformer_config": text,
            "vision_transformer_config": _tower(config.vision_config),
            "vision_projection_config": projector,
            "vision_feature_layer": config.vision_feature_layer,
            **numbers,
        },
    )


def _tower(vision: Any) -> Call:
    """NeMo's class takes hidden_size alone, or a hub name that it downloads weights of.

    functools.update_wrapper puts the other sizes on what it made.
    """
    sizes = {name: getattr(vision, name) for name in TOWER_SIZES}
    tokens = (vision.image_size // vision.patch_size) ** 2
    given = sizes | {"num_image_embeddings_per_tile": tokens}
    made = Call(Symbol(VISION, "HFCLIPVisionConfig"), {"hidden_size": vision.hidden_size})
    return Call(
        Symbol("functools", "update_wrapper"),
        {
            "wrapper": made,
            "wrapped": Call(Symbol("argparse", "Namespace"), given),
            "assigned": tuple(given),
            "updated": (),
        },
    )

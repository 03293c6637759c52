"""Writes tests/families/NAME.json: configs of full-size models and the shapes of their tensors.

Shapes come from transformers' models on the meta device, under the published names, without the
package under test. Configs omit the keys that the published configs omit.

    python tests/make_family_fixtures.py [FOLDER]
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from models import published_name
from published_configs import (
    CLIP_L,
    GEMMA3_4B,
    GEMMA3_27B,
    GEMMA4_31B,
    INTERN_3_5_8B,
    INTERN_8B,
    INTERN_TEXT,
    INTERN_TEXT_3_5,
    INTERN_TEXT_38B,
    INTERN_TOWER_6B,
    LLAMA_3,
    LLAMA_13B,
    MISTRAL_7B,
    SHEARED_LLAMA,
    VICUNA_7B,
    VICUNA_13B,
    gemma3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    phi,
    vila,
)
from published_llama_configs import (
    IDEFICS3_8B,
    MINISTRAL_3B,
    MINISTRAL_8B,
    MISTRAL_SMALL_24B,
    PIXTRAL_12B,
    SMOLVLM2_2B,
)
from published_qwen_configs import (
    QWEN2_5_3B,
    QWEN2_5_TOWER,
    QWEN2_7B,
    QWEN2_TOWER,
    QWEN3_2B,
    QWEN3_2B_TOWER,
    QWEN3_5_4B,
    QWEN3_5_27B,
    QWEN3_8B,
    QWEN3_8B_TOWER,
    QWEN3_32B,
    qwen,
    qwen3_5,
)

FOLDER = Path(__file__).resolve().parent / "families"
LAYER = re.compile(r"\.(layers?|blocks)\.(\d+)\.")
FLAT_LIST = re.compile(r"\[[^][{}]+\]")
PATCHES_PER_TOKEN = 4  # of VILA and Phi


def meta_shapes(model, config, values, tensors="named_parameters"):
    """Return name -> shape of a transformers model, built on the meta device."""
    import transformers

    with torch.device("meta"):
        module = getattr(transformers, model)(getattr(transformers, config).from_dict(values))
    return {name: list(tensor.shape) for name, tensor in dict(getattr(module, tensors)()).items()}


def tower_tensors(architecture, prefix, config):
    """Return name -> shape of a vision tower; transformers 5 omits `vision_model.` in CLIP."""
    shapes = meta_shapes(f"{architecture}VisionModel", f"{architecture}VisionConfig", config)
    bare = {name.removeprefix("vision_model."): shape for name, shape in shapes.items()}
    return {f"{prefix}vision_model.{name}": shape for name, shape in bare.items()}


def llava_tensors(config):
    """Return name -> shape of a LLaVA or LLaVA-NeXT."""
    model = config["architectures"][0]
    shapes = meta_shapes(model, model.replace("ForConditionalGeneration", "Config"), config)
    return {published_name(name): shape for name, shape in shapes.items()}


def vila_tensors(config):
    """Return SUBFOLDER/NAME -> shape of a VILA; transformers does not have the projector."""
    llm = meta_shapes("LlamaForCausalLM", "LlamaConfig", config["llm_cfg"])
    width, hidden = PATCHES_PER_TOKEN * config["mm_hidden_size"], config["hidden_size"]
    projector = {
        "1.weight": [width], "1.bias": [width], "2.weight": [hidden, width], "2.bias": [hidden],
        "4.weight": [hidden, hidden], "4.bias": [hidden],
    }  # fmt: skip
    return {
        **{f"llm/{name}": shape for name, shape in llm.items()},
        **tower_tensors("Siglip", "vision_tower/", config["vision_tower_cfg"]),
        **{f"mm_projector/layers.{name}": shape for name, shape in projector.items()},
    }


def phi_tensors(config):
    """Return name -> shape of a Phi-3-vision; transformers lacks separators and projector.

    Phi3Config gets only the sizes, as it does not accept the published rope type.
    """
    sizes = {key: config[key] for key in config if key.endswith(("_size", "_layers", "_heads"))}
    width, hidden = PATCHES_PER_TOKEN * CLIP_L["hidden_size"], config["hidden_size"]
    embed = "model.vision_embed_tokens."
    joint = {
        "glb_GN": [1, 1, width], "sub_GN": [1, 1, 1, width],
        "img_projection.0.weight": [hidden, width], "img_projection.0.bias": [hidden],
        "img_projection.2.weight": [hidden, hidden], "img_projection.2.bias": [hidden],
    }  # fmt: skip
    return {
        **meta_shapes("Phi3ForCausalLM", "Phi3Config", sizes),
        **tower_tensors("CLIP", embed + "img_processor.", CLIP_L),
        **{embed + name: shape for name, shape in joint.items()},
    }


def mistral3_tensors(config):
    """Return name -> shape of a Mistral 3 or a Pixtral under its published names."""
    model = config["architectures"][0]
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", False)}  # not transformers'
    kind = model.replace("ForConditionalGeneration", "Config")
    shapes = meta_shapes(model, kind, config | tied)
    aliases = (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    )
    for pattern, published in aliases:
        shapes = {re.sub(pattern, published, name): shape for name, shape in shapes.items()}
    return shapes


def qwen_tensors(config):
    """Return name -> shape of a Qwen-VL under its published names."""
    model = config["architectures"][0]
    shapes = meta_shapes(model, model.replace("ForConditionalGeneration", "Config"), config)
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight", None)
    if model.startswith("Qwen3"):
        return shapes
    old = (("model.language_model.", "model."), ("model.visual.", "visual."))
    for prefix, published in old:
        shapes = {name.replace(prefix, published): shape for name, shape in shapes.items()}
    return shapes


def internvl_tensors(config):
    """Return name -> shape of an InternVL under its published names."""
    tied = {"tie_word_embeddings": config["text_config"]["tie_word_embeddings"]}
    shapes = meta_shapes("InternVLForConditionalGeneration", "InternVLConfig", config | tied)
    return {
        name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .removeprefix("model."): shape
        for name, shape in shapes.items()
    }


def gemma3_tensors(config):
    """Return name -> shape of a Gemma 3 under its published names; the head is the embedding."""
    shapes = llava_tensors(config)
    return {name: shape for name, shape in shapes.items() if "lm_head" not in name}


def gemma4_tensors(config):
    """Return name -> shape of a Gemma 4 under its published names; buffers are stored, too."""
    shapes = meta_shapes(config["architectures"][0], "Gemma4Config", config, "state_dict")
    return {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}


def smolvlm_tensors(config):
    """Return name -> shape of a SmolVLM or Idefics3, whose published names are transformers'."""
    model = config["architectures"][0]
    return meta_shapes(model, model.replace("ForConditionalGeneration", "Config"), config)


MODELS = {
    "gemma3": (gemma3_tensors, {
        "gemma-3-4b-it": gemma3(GEMMA3_4B),
        "gemma-3-27b-it": gemma3(GEMMA3_27B),
    }),
    "gemma4": (gemma4_tensors, {"gemma-4-31B-it": GEMMA4_31B}),
    "internvl": (internvl_tensors, {
        "InternVL3-8B-hf": internvl(INTERN_TEXT | INTERN_8B),
        "InternVL3-38B-hf": internvl(INTERN_TEXT_38B, INTERN_TOWER_6B),
        "InternVL3_5-2B-HF": internvl(INTERN_TEXT_3_5 | {
            "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
            "num_hidden_layers": 28, "num_key_value_heads": 8, "tie_word_embeddings": True,
        }),
        "InternVL3_5-8B-HF": internvl(INTERN_TEXT_3_5 | INTERN_3_5_8B) | {"image_token_id": 151671},
    }),
    "llava": (llava_tensors, {
        "llava-1.5-7b-hf": llava(VICUNA_7B),
        "llava-1.5-13b-hf": llava(VICUNA_13B),
    }),
    "llava_next": (llava_tensors, {
        "llava-v1.6-vicuna-7b-hf": llava_next(VICUNA_7B),
        "llava-v1.6-mistral-7b-hf": llava_next(MISTRAL_7B),
    }),
    "llava_onevision": (llava_tensors, {
        "llava-onevision-qwen2-7b-ov-hf": llava_onevision(QWEN2_7B | {"vocab_size": 152000}),
        "llava-onevision-qwen2-0.5b-ov-hf": llava_onevision({
            "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True,
        }),
    }),
    "mistral3": (mistral3_tensors, {
        "Mistral-Small-3.1-24B-Instruct-2503": MISTRAL_SMALL_24B,
        "Ministral-3-8B-Instruct-2512-BF16": MINISTRAL_8B,
        "Ministral-3-3B-Instruct-2512-BF16": MINISTRAL_3B,
        "pixtral-12b": PIXTRAL_12B,
    }),
    "phi": (phi_tensors, {
        "Phi-3-vision-128k-instruct": phi("Phi-3-vision-128k-instruct", "su", 131072),
        "Phi-3.5-vision-instruct": phi("Phi-3.5-vision-instruct", "longrope", 262144),
    }),
    "qwen2_vl": (qwen_tensors, {
        "Qwen2.5-VL-7B-Instruct": qwen("Qwen2_5_VL", QWEN2_7B, QWEN2_5_TOWER, tied=False),
        "Qwen2.5-VL-3B-Instruct": qwen("Qwen2_5_VL", QWEN2_5_3B, QWEN2_5_TOWER | {
            "out_hidden_size": 2048,
        }, tied=True),
        "Qwen2-VL-7B-Instruct": qwen("Qwen2VL", QWEN2_7B, QWEN2_TOWER, tied=False),
    }),
    "qwen3_5": (qwen_tensors, {
        "Qwen3.6-27B": qwen3_5(QWEN3_5_27B),
        "Qwen3.5-4B": qwen3_5(QWEN3_5_4B, QWEN3_2B_TOWER, tied=True),
    }),
    "qwen3_vl": (qwen_tensors, {
        "Qwen3-VL-2B-Instruct": qwen("Qwen3VL", QWEN3_2B, QWEN3_2B_TOWER, tied=True),
        "Qwen3-VL-8B-Instruct": qwen("Qwen3VL", QWEN3_8B, QWEN3_8B_TOWER, tied=False),
        "Qwen3-VL-32B-Instruct": qwen("Qwen3VL", QWEN3_32B, QWEN3_8B_TOWER | {
            "out_hidden_size": 5120,
        }, tied=False),
    }),
    "smolvlm": (smolvlm_tensors, {
        "SmolVLM2-2.2B-Instruct": SMOLVLM2_2B,
        "Idefics3-8B-Llama3": IDEFICS3_8B,
    }),
    "vila": (vila_tensors, {
        "VILA1.5-3b": vila("VILA1.5-3b", SHEARED_LLAMA),
        "Llama-3-VILA1.5-8b": vila("Llama-3-VILA1.5-8b", LLAMA_3),
        "VILA1.5-13b": vila("VILA1.5-13b", LLAMA_13B),
    }),
}  # fmt: skip


def fold(tensors):
    """Merge the entries of `.layers.0.` to `.layers.31.`, or of blocks, into `.layers.{0..31}.`.

    Tensors that some layers lack, or have in another shape, have several ranges: `{0..2,4..6}`.
    """
    layers = defaultdict(list)
    for name, shape in tensors.items():
        match = LAYER.search(name)
        pattern = LAYER.sub(r".\1.{}.", name)
        layers[pattern, tuple(shape)].append(int(match[2]) if match else 0)
    return {
        pattern.replace("{}", f"{{{ranges(found)}}}"): list(shape)
        for (pattern, shape), found in sorted(layers.items())
    }


def ranges(layers):
    """Return `0..2,4..6` of [0, 1, 2, 4, 5, 6]."""
    layers = sorted(layers)
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ",".join(f"{start}..{end}" for start, end in zip(starts, ends, strict=True))


def main(folder=FOLDER):
    """Write the fixture of every family."""
    folder.mkdir(exist_ok=True)
    for family, (tensors, configs) in MODELS.items():
        models = {
            name: {"config": config, "tensors": fold(tensors(config))}
            for name, config in configs.items()
        }
        text = json.dumps({"models": models}, indent=1)
        compact = FLAT_LIST.sub(lambda match: json.dumps(json.loads(match[0])), text)
        (folder / f"{family}.json").write_text(compact + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

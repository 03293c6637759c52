"""Makes a LLaVA-1.5-7B-shaped checkpoint with random weights, for runs at real size.

    python benchmarks/random_llava.py FOLDER [LAYERS]

Published layout and names, bf16, four shards; LAYERS (default 32) layers of 4096 x 11008. Tokenizer
and image processor are tiny-llava's, at 336 pixels.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from nemo_vlm_ptq.families import find_family
from nemo_vlm_ptq.parallel import split_evenly
from nemo_vlm_ptq.store import save_tensors, write_json

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-llava"
SHARDS = 4


def config(layers: int) -> dict[str, object]:
    """config.json: the published sizes, with the token ids of tiny-llava."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 3,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "vocab_size": 32064,
            "rms_norm_eps": 1e-05,
            "max_position_embeddings": 4096,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    }


def main() -> None:
    """Write the folder."""
    folder, layers = Path(sys.argv[1]), int((*sys.argv, "32")[2])
    folder.mkdir(parents=True)
    whole = config(layers)
    family = find_family(whole)
    shapes = family.decoder(whole).shapes(family.rows) | family.vision_shapes(whole)
    names = sorted(shapes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {}
        for name in split_evenly(names, SHARDS, shard):
            noise = torch.randn(shapes[name], generator=generator, device=device) * 0.02
            tensors[name] = (noise + ("norm" in name and "weight" in name)).bfloat16()
            index[name] = file
        save_tensors(tensors, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_json(folder / "config.json", whole)
    processor = json.loads((TINY / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    write_json(folder / "preprocessor_config.json", processor)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, folder / name)
    shutil.copy(TINY / "generation_config.json", folder / "generation_config.json")


if __name__ == "__main__":
    main()

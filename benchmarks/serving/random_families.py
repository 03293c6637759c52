"""Quantize tiny random models of the families that vLLM serves, for compare_logprobs.py.

    python benchmarks/serving/random_families.py HOME [FAMILY ...]
    python benchmarks/serving/compare_logprobs.py ask HOME/FAMILY ...

The models are those of the tests, with heads and recurrent states that servers' kernels take, and
with what their processors read of a folder and this package does not. HOME/FAMILY becomes the
workdir of a run, with exports for compressed-tensors and unified Hugging Face, and with the
distributions of the reader. Runs in one process, on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

FORMATS = ("fp8", "int8_sq", "int4_awq", "nvfp4")
GEMMA_TOKENS = ("image_token", "boi_token", "eoi_token")
TOKENIZERS: dict[str, dict[str, str]] = {  # what processors take from tokenizer_config.json
    "gemma3": dict(
        zip(GEMMA_TOKENS, ("<image_soft_token>", "<start_of_image>", "<end_of_image>"), strict=True)
    ),
    "gemma4": dict(zip(GEMMA_TOKENS, ("<|image|>", "<|image>", "<image|>"), strict=True))
    | {"video_token": "<|video|>"}
    | dict.fromkeys(("audio_token", "boa_token", "eoa_token"), "<|audio|>"),
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "filler1",
    },
}
MISTRAL = {"patch_size": 8, "spatial_merge_size": 2, "processor_class": "PixtralProcessor"}
PROCESSORS: dict[str, dict[str, Any]] = {  # processor_config.json
    "gemma3": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
    "gemma4": {"image_seq_length": 70, "processor_class": "Gemma4Processor"},
    "internvl": {"image_seq_length": 4, "processor_class": "InternVLProcessor"},
    "idefics3": {"image_seq_len": 4, "processor_class": "Idefics3Processor"},
    "llava_next": {
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "processor_class": "LlavaNextProcessor",
    },
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
        "processor_class": "LlavaOnevisionProcessor",
    },
    "pixtral": MISTRAL | {"spatial_merge_size": 1},
    "mistral3": MISTRAL,
    "ministral3": MISTRAL,
}
NEXT_TEMPLATE = (
    "{% for message in messages %}[INST] {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} "
    "[/INST]{% endfor %}"
)


def writers() -> dict[str, Callable[[Path], None]]:
    """Return family or kind -> function that writes a model folder, with sizes for servers."""
    import processors
    import reference_gemma3
    import reference_internvl
    import reference_llava_next
    import reference_llava_onevision
    import reference_mistral3
    import reference_qwen
    import reference_smolvlm

    heads = {"num_attention_heads": 2}
    for module in (reference_gemma3, reference_internvl, reference_smolvlm):
        module.TOWER.update(heads)
    reference_mistral3.TOWER.update(heads | {"head_dim": 32})
    reference_llava_next.CLIP.update(heads)
    reference_llava_onevision.SIGLIP.update(heads)
    reference_qwen.TOWER["num_heads"] = 2
    reference_qwen.DELTA_NET.update(linear_key_head_dim=128, linear_value_head_dim=128)
    reference_qwen.TEXTS["qwen3_5"].update(reference_qwen.DELTA_NET)
    kept = {name: one for name, one in processors.WRITERS.items() if name not in ("vila", "phi")}
    kept["idefics3"] = kept.pop("smolvlm")
    for name, kind in (("mistral3", "mistral"), ("ministral3", "ministral3"), ("pixtral",) * 2):
        kept[name] = partial(processors.write_mistral3, kind=kind)
    return kept


def write_model(name: str, write: Callable[[Path], None], folder: Path) -> None:
    """Write a model folder, with the files of servers' processors."""
    write(folder)
    if name in TOKENIZERS:
        tokens = TOKENIZERS[name]
        update_json(
            folder / "tokenizer_config.json", tokens, extra_special_tokens=tokens, pad_token="<unk>"
        )
    if name in PROCESSORS:
        update_json(folder / "processor_config.json", PROCESSORS[name])
    if name == "llava_next":
        (folder / "chat_template.jinja").write_text(NEXT_TEMPLATE)


def update_json(path: Path, values: dict[str, Any], **others: Any) -> None:
    """Set keys of a JSON file, which need not exist."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values | others))


def quantize(home: Path, names: list[str]) -> None:
    """Run the stages and write the distributions for each model."""
    from compare_logprobs import read_run

    from nemo_vlm_ptq.context import RunContext
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context
    from nemo_vlm_ptq.planning.make_plan import make_plan
    from nemo_vlm_ptq.recipe import Recipe
    from nemo_vlm_ptq.stages import run_stages

    available = writers()
    with parallel_context({"tensor": 1, "pipeline": 1, "data": 1}) as parallel:
        for name in names or available:
            start, folder = time.time(), home / name
            write_model(name, available[name], folder / "model")
            recipe = Recipe(
                model=str(folder / "model"),
                workdir=str(folder),
                quantize={"format": FORMATS},
                calibration={"data": "scenes", "samples": 16, "micro_batch": 4},
                export={"targets": ("compressed_tensors", "hf"), "dtype": "bfloat16"},
            )
            context = RunContext(plan=make_plan(recipe), parallel=parallel)
            run_stages(context, ("observe", "solve", "export", "verify"))
            read_run(recipe, parallel, 3)
            print(f"{name}: {time.time() - start:.0f} s on {parallel.device}", flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    args = parser.parse_args()
    quantize(args.home, args.families)


if __name__ == "__main__":
    main()

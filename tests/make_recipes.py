"""Writes configs/MODEL_FORMAT.yaml: a recipe for every published model and format.

python tests/make_recipes.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_vlm_ptq.formats import FORMATS

FOLDER = Path(__file__).resolve().parent.parent / "configs"
MODELS = {  # name in configs/ -> name to say, hub id
    "llava15_7b": ("LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf"),
    "llava15_13b": ("LLaVA-1.5-13B", "llava-hf/llava-1.5-13b-hf"),
    "vila15_3b": ("VILA1.5-3B", "Efficient-Large-Model/VILA1.5-3b"),
    "vila15_8b": ("Llama-3-VILA1.5-8B", "Efficient-Large-Model/Llama-3-VILA1.5-8b"),
    "phi3_vision": ("Phi-3-vision", "microsoft/Phi-3-vision-128k-instruct"),
    "phi35_vision": ("Phi-3.5-vision", "microsoft/Phi-3.5-vision-instruct"),
}
TARGETS = ("trtllm", "hf")
RECIPE = """\
# {said} in {format}: {about}.
# The drawn scenes need no download; for GQA, or images of your own, name folders with a questions
# .json in GQA's format and images/ID.jpg: calibration.data=data/gqa evaluate.data=data/gqa_testdev
model: {model}
workdir: work/{name}
quantize: {{format: {format}}}
calibration: {{data: scenes, samples: 512, micro_batch: 16}}
export: {{targets: [{targets}], tensor: 1}}
evaluate: {{tasks: [gqa, sight], data: scenes, gate: {{gqa_drop: 0.5}}}}
"""


def recipes() -> dict[str, str]:
    """File name -> text."""
    made = {}
    for short, (said, model) in MODELS.items():
        for row in FORMATS.values():
            name = f"{short}_{row.name}"
            made[f"{name}.yaml"] = RECIPE.format(
                said=said,
                about=row.about,
                format=row.name,
                model=model,
                name=name,
                targets=", ".join(target for target in TARGETS if target in row.targets),
            )
    return made


def main(folder: Path = FOLDER) -> None:
    """Write the file of every recipe."""
    for name, text in recipes().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Tokenizer and image processor files beside the references, so that questions can be prepared."""

from __future__ import annotations

import json
from pathlib import Path

import reference_llava_next
import reference_phi
import reference_vila
from tiny_tokenizers import write_llama

PHI_MARKS = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>")
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
MARKS_FROM = 490  # ids of special tokens, below the references' vocabulary


def _write(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def vila_images(folder: Path) -> None:
    """The image processor of a VILA folder."""
    side = reference_vila.SIDE
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": side, "width": side},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    _write(folder / "vision_tower", settings)


def phi_images(folder: Path, crops: int) -> None:
    """The image processor of a Phi folder."""
    _write(folder, {"num_crops": crops, "image_mean": CLIP_MEAN, "image_std": CLIP_STD})


def llava_next_images(folder: Path) -> None:
    """The image processor of a LLaVA-NeXT folder."""
    side = reference_llava_next.SIDE
    settings = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_grid_pinpoints": reference_llava_next.GRIDS,
    }
    _write(folder, settings)


def write_vila(folder: Path) -> None:
    """A whole random VILA folder."""
    reference_vila.write_vila(folder, 0)
    vila_images(folder)
    write_llama(folder / "llm", size=MARKS_FROM)


def write_phi(folder: Path) -> None:
    """A whole random Phi folder."""
    reference_phi.write_phi(folder, 0)
    phi_images(folder, 4)
    write_llama(folder, PHI_MARKS, size=MARKS_FROM)


def write_llava_next(folder: Path) -> None:
    """A whole random LLaVA-NeXT folder."""
    reference_llava_next.write_llava_next(folder, 0)
    llava_next_images(folder)
    write_llama(folder, ["<image>"], size=reference_llava_next.IMAGE)


WHOLE = {"vila": write_vila, "phi": write_phi, "llava_next": write_llava_next}

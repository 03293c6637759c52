"""Read the files of Hugging Face checkpoints: the 16 bit source, and exports of several targets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_vlm_ptq.checkpoints.huggingface import SourceTensor, open_source
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.base import ModelFamily
from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint


def read_source(tensors: Mapping[str, SourceTensor]) -> ReadCheckpoint:
    """Read all tensors of a 16 bit checkpoint under their published names."""
    with open_source(tensors) as reader:
        return ReadCheckpoint(linears={}, plain={name: reader.get_tensor(name) for name in tensors})


def read_files(folder: Path, family: ModelFamily) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read `quantization_config` of the decoder's config.json, and all tensors.

    Tensors in a sub-folder of the family are named SUBFOLDER/NAME.

    Raises:
        VerificationError: a file is missing or damaged.
    """
    try:
        text = (folder / family.decoder_subfolder / "config.json").read_text()
        config = json.loads(text)["quantization_config"]
        tensors = {}
        for subfolder in family.subfolders:
            prefix = f"{subfolder}/" if subfolder else ""
            for path in sorted((folder / subfolder).glob("*.safetensors")):
                tensors.update({prefix + name: t for name, t in load_file(path).items()})
    except Exception as error:  # safetensors raises its own exception types for damaged files
        raise VerificationError(f"{folder}: checkpoint cannot be read: {error}") from None
    return config, tensors

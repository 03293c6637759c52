"""The plan of a run: recipe, model, formats and parallel layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import SourceTensor
from nemo_vlm_ptq.checkpoints.model_config import with_dtype
from nemo_vlm_ptq.families import Decoder, ModelFamily
from nemo_vlm_ptq.formats import QuantFormat, find_format
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.targets.registry import supported_targets


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe that can run, with everything read from the model's headers.

    folder: the model folder.
    config: its config.json with the recipe's overrides.
    tensors: published name -> tensor on disk.
    vision_names: tensors beside the decoder that stay in 16 bit: tower, projector, copied tensors.
    dtype: dtype of 16 bit weights from import to export.
    """

    recipe: Recipe
    folder: Path
    config: dict[str, Any]
    family: ModelFamily
    decoder: Decoder
    tensors: dict[str, SourceTensor]
    vision_names: tuple[str, ...]
    dtype: str

    @property
    def formats(self) -> list[QuantFormat]:
        """The requested formats."""
        return [find_format(name) for name in self.recipe.quantize.format]

    @property
    def export_config(self) -> dict[str, Any]:
        """config.json of the exports: the model's, in the dtype of its weights."""
        return with_dtype(self.config, self.dtype)

    def targets(self, fmt: QuantFormat) -> list[str]:
        """Return the requested targets that store a format together with the KV cache format."""
        supported = supported_targets(fmt, self.recipe.quantize.kv_cache)
        return [target for target in self.recipe.export.targets if target in supported]

    def needs_second_moments(self, fmt: QuantFormat) -> bool:
        """Whether solving a format searches over scales, which needs second moments."""
        searched = self.recipe.quantize.smoothquant_alpha == "search"
        return fmt.algorithm == "awq" or (fmt.algorithm == "smoothquant" and searched)

    @property
    def second_moments(self) -> bool:
        """Whether any requested format needs second moments."""
        return any(self.needs_second_moments(fmt) for fmt in self.formats)

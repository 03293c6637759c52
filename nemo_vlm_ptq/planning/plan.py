"""The plan of a run: recipe, model, formats and parallel layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nemo_vlm_ptq.checkpoints.huggingface import SourceTensor
from nemo_vlm_ptq.checkpoints.model_config import with_dtype
from nemo_vlm_ptq.families import Decoder, ModelFamily
from nemo_vlm_ptq.formats import QuantFormat, find_format
from nemo_vlm_ptq.parameter_map.entries import ParameterEntry
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.targets.registry import TARGETS, supported_targets, with_sources


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

    @cached_property
    def parameter_map(self) -> tuple[ParameterEntry, ...]:
        """Megatron's parameters and the published tensors that they hold."""
        return self.family.parameter_map(self.decoder)

    @property
    def head_name(self) -> str:
        """Published name of the output layer's weight, which a tied model does not have."""
        return self.family.published_decoder_name("lm_head.weight")

    @property
    def formats(self) -> list[QuantFormat]:
        """The requested formats."""
        return [find_format(name) for name in self.recipe.quantize.format]

    @property
    def export_config(self) -> dict[str, Any]:
        """config.json of the exports: the model's, in the dtype of its weights."""
        return with_dtype(self.config, self.dtype)

    def targets(self, fmt: QuantFormat) -> list[str]:
        """Return the targets to write that store a format together with the KV cache format.

        These are the requested ones, and those that they are made from.
        """
        supported = supported_targets(fmt, self.recipe.quantize.kv_cache)
        return with_sources(one for one in self.recipe.export.targets if one in supported)

    def export_folder(self, fmt: QuantFormat, target: str) -> Path:
        """Return the folder of one export."""
        return Path(self.recipe.workdir, fmt.name, TARGETS[target].folder)

    def readable_targets(self, fmt: QuantFormat) -> list[str]:
        """Return the targets to write that the reference model can run."""
        return [target for target in self.targets(fmt) if TARGETS[target].has_reader]

    def moments_for(self, fmt: QuantFormat) -> Literal["", "sketch", "whole"]:
        """Return what solving a format needs to know of second moments.

        A search over scales needs a sketch. SVDQuant takes them whole.
        """
        if fmt.low_rank:
            return "whole"
        searched = self.recipe.quantize.smoothquant_alpha == "search"
        searches = fmt.algorithm == "awq" or (fmt.algorithm == "smoothquant" and searched)
        return "sketch" if searches else ""

    @property
    def moments(self) -> tuple[str, ...]:
        """What the requested formats need of second moments: sketch, whole, both or nothing."""
        return tuple(sorted({self.moments_for(fmt) for fmt in self.formats} - {""}))

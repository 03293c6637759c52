"""The keys of a recipe, their types and defaults, as frozen records."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nemo_vlm_ptq.constants import DEFAULT_STAGES, STAGE_GROUPS, STAGES
from nemo_vlm_ptq.errors import UserError, has_control_characters
from nemo_vlm_ptq.formats import find_format
from nemo_vlm_ptq.recipe.words import canonical, explain_target
from nemo_vlm_ptq.targets.registry import TARGETS

MAX_SAMPLES = 1_000_000
MAX_SIZE = 1 << 16  # of groups, batches and ranks
MAX_INTEGER = 2**31 - 1


def _expand(path: str) -> str:
    """Expand ~ and environment variables in a path."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "$" in expanded:
        raise ValueError("an environment variable in it is not set")
    _reject_control_characters(expanded)
    return expanded


def _reject_control_characters(value: Any) -> None:
    """Reject control characters in strings, also in lists and in keys and values of mappings."""
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, str) and has_control_characters(part):
            raise ValueError("Input should have no control characters, such as line ends")
        if isinstance(part, Mapping | list | tuple) and id(part) not in seen:
            seen.add(id(part))  # an alias of YAML may repeat a part, or hold itself
            waiting += [*part, *(part.values() if isinstance(part, Mapping) else ())]


ExpandedPath = Annotated[str, AfterValidator(_expand)]


Word = BeforeValidator(canonical)  # in any case, under any of its names


class RecipeSection(BaseModel):
    """A frozen record that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _reject_unsuitable(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject control characters, and YAML's yes and no for a number or a string."""
        _reject_control_characters(value)
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"Input should not be {str(value).lower()}")
        return value


class Parallel(RecipeSection):
    """Parallel layout of import, observe and solve.

    tensor, pipeline: auto is the smallest that fits a GPU; data: auto uses the remaining ranks.
    """

    tensor: int | Literal["auto"] = "auto"
    pipeline: int | Literal["auto"] = 1
    data: int | Literal["auto"] = "auto"

    @field_validator("tensor", "pipeline", "data", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and 1 <= value <= MAX_SIZE):
            raise ValueError("Input should be a positive number of ranks or 'auto'")
        return value


class Quantize(RecipeSection):
    """Formats and the options of solving their scales; several formats share one observe.

    smoothquant_alpha: exponent of int8_sq, or search per linear.
    image_share: weight of image tokens against text tokens in searches, 0 to 1; None: their share
    of the calibration tokens; search: per linear.
    """

    format: tuple[str, ...] = Field(("fp8",), min_length=1)
    kv_cache: Annotated[Literal["none", "fp8", "int8", "nvfp4"], Word] = "none"
    group_size: int = Field(128, ge=16, le=MAX_SIZE)
    smoothquant_alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 1.0
    image_share: Annotated[float, Field(ge=0, le=1)] | Literal["search"] | None = None

    @field_validator("format", mode="before")
    @classmethod
    def _known_formats(cls, value: Any) -> tuple[str, ...]:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            raise ValueError("Input should be a format or a list of formats")
        try:
            return tuple(dict.fromkeys(find_format(str(name)).name for name in names))
        except UserError as error:
            raise ValueError(str(error)) from None


class Calibration(RecipeSection):
    """Calibration data and how observe runs it.

    window: layers that a rank takes at a time; auto: all, or as many as fit.
    keep_statistics: write the statistics, so that later formats need no observe.
    max_pixels: area that images are resized to at most, in families that take any size.
    save_every: micro-batches of a rank between two saves.
    """

    data: ExpandedPath | None = None
    samples: int = Field(512, ge=1, le=MAX_SAMPLES)
    micro_batch: int = Field(8, ge=1, le=MAX_SIZE)
    seed: int = Field(0, ge=-MAX_INTEGER, le=MAX_INTEGER)
    modality: Annotated[Literal["image_text", "text"], Word] = "image_text"
    window: int | Literal["auto"] = "auto"
    keep_statistics: bool = False
    max_pixels: int = Field(1 << 20, ge=1, le=MAX_INTEGER)
    save_every: int = Field(64, ge=1, le=MAX_INTEGER)

    @field_validator("window", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value >= 1):
            raise ValueError("Input should be a positive number of layers or 'auto'")
        return value


class Export(RecipeSection):
    """Exported checkpoints: targets, dtype, and the serving layout of the TensorRT-LLM target."""

    targets: tuple[str, ...] = Field(("compressed_tensors",), min_length=1)
    tensor: int = Field(1, ge=1, le=MAX_SIZE)
    pipeline: int = Field(1, ge=1, le=MAX_SIZE)
    # auto: that of the source
    dtype: Annotated[Literal["auto", "bfloat16", "float16"], Word] = "auto"

    @field_validator("targets", mode="after")
    @classmethod
    def _known_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(str(canonical(name)) for name in value))
        for name in names:
            if name not in TARGETS:
                raise ValueError(
                    f"unknown target {name!r}; supported: {', '.join(TARGETS)}"
                    f"{explain_target(name)}"
                )
        return names


class Engine(RecipeSection):
    """TensorRT-LLM engines: build limits, and the GPU memory of their KV cache.

    Lengths are in tokens, image tokens included. context_logits: engines return the logits of every
    prompt token, as `logits from=engine` needs. vila_path: a clone of VILA, for its vision tower.
    """

    max_batch_size: int = Field(8, ge=1, le=MAX_SIZE)
    max_input_len: int = Field(4096, ge=1, le=MAX_INTEGER)
    max_seq_len: int = Field(4608, ge=2, le=MAX_INTEGER)
    kv_cache_free_gpu_memory_fraction: float = Field(0.8, gt=0, lt=1)
    context_logits: bool = False
    vila_path: ExpandedPath | None = None


class Gate(RecipeSection):
    """Largest accepted loss of accuracy against 16 bit, in percentage points."""

    gqa_drop: float | None = Field(None, ge=0, allow_inf_nan=False)


class Evaluate(RecipeSection):
    """Scoring of the exported checkpoint, or, with from=engine, of the engine."""

    form: Literal["export", "engine"] = Field("export", alias="from")
    tasks: tuple[Literal["gqa", "sight"], ...] = ("gqa", "sight")
    data: ExpandedPath | None = None
    limit: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    batch: int = Field(64, ge=1, le=MAX_SIZE)
    gate: Gate = Gate()


class Recipe(RecipeSection):
    """One run, from a Hugging Face folder to verified and scored checkpoints.

    config: keys of the model's config.json to override. stages: by default all but build, and
    evaluate only where evaluate.data is set.
    """

    model: ExpandedPath
    workdir: ExpandedPath
    family: str = "auto"
    config: dict[str, Any] = {}
    stages: tuple[str, ...] = Field(DEFAULT_STAGES, min_length=1)
    parallel: Parallel = Parallel()
    quantize: Quantize = Quantize()
    calibration: Calibration = Calibration()
    export: Export = Export()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="before")
    @classmethod
    def _default_stages(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or "stages" in tree:
            return tree
        evaluate = tree.get("evaluate")
        data = (
            evaluate.get("data") if isinstance(evaluate, dict) else getattr(evaluate, "data", None)
        )
        names = [name for name in DEFAULT_STAGES if name != "evaluate" or data is not None]
        return tree | {"stages": tuple(names)}

    @field_validator("config", mode="before")
    @classmethod
    def _only_json(cls, value: Any) -> Any:
        try:
            json.dumps(value, allow_nan=False)
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"Input should hold values of JSON only: {error}") from None
        return value

    @field_validator("stages", mode="after")
    @classmethod
    def _known_stages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in STAGES:
                raise ValueError(f"unknown stage {name!r}; supported: {', '.join(STAGES)}")
        return value

    def stages_of(self, command: str) -> tuple[str, ...]:
        """Return the stages that a command runs; `run` and `plan` mean those of the recipe."""
        if command in ("run", "plan"):
            return self.stages
        return STAGE_GROUPS.get(command, (command,))

    @property
    def verification_data(self) -> str | None:
        """Data of the questions that verify compares logits with."""
        return self.evaluate.data or self.calibration.data

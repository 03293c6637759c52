"""The recipe: one YAML file, one frozen record, the only input of every stage."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from nemo_vlm_ptq.constants import DEFAULT_STAGES, STAGES
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import TARGETS, find_format

TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def _filled_in(path: str) -> str:
    """A path with the home folder and variables of the environment in it."""
    whole = os.path.expandvars(os.path.expanduser(path))
    if "$" in whole:
        raise ValueError("a variable in it is not set")
    return whole


ExpandedPath = Annotated[str, AfterValidator(_filled_in)]


class RecipeSection(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes and no are no numbers."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"Input should not be {str(value).lower()}")
        return value


class Parallel(RecipeSection):
    """Ranks that import, observe and solve run on.

    tensor, pipeline: auto takes the smallest that fits a GPU; data: auto takes the other ranks.
    """

    tensor: int | Literal["auto"] = "auto"
    pipeline: int | Literal["auto"] = 1
    data: int | Literal["auto"] = "auto"

    @field_validator("tensor", "pipeline", "data", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value >= 1):
            raise ValueError("Input should be a positive number of ranks or 'auto'")
        return value


class Quantize(RecipeSection):
    """What is quantized and how; several formats share one observe.

    smoothquant_alpha: exponent of int8_sq, or searched per linear. image_share: weight of image
    tokens against text tokens in AWQ's statistics, 0 to 1; None: as many as there were; searched
    per linear.
    """

    format: tuple[str, ...] = Field(("fp8",), min_length=1)
    kv_cache: Literal["none", "fp8", "int8", "nvfp4"] = "none"
    group_size: int = Field(128, ge=16)
    smoothquant_alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 1.0
    image_share: Annotated[float, Field(ge=0, le=1)] | Literal["search"] | None = None

    @field_validator("format", mode="before")
    @classmethod
    def _list_of_known(cls, value: Any) -> tuple[str, ...]:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            raise ValueError("Input should be a format or a list of formats")
        try:
            return tuple(dict.fromkeys(find_format(str(name)).name for name in names))
        except UserError as error:
            raise ValueError(str(error)) from None


class Calibration(RecipeSection):
    """Data that observe runs the model over."""

    data: ExpandedPath = "scenes"
    samples: int = Field(512, ge=1)
    micro_batch: int = Field(8, ge=1)
    seed: int = 0
    modality: Literal["image_text", "text"] = "image_text"
    max_statistics_memory: ByteSize | None = Field(None, gt=0)  # a rank; None: most of what is free
    save_every: int = Field(64, ge=1)  # micro-batches of a rank


class Export(RecipeSection):
    """Written checkpoints: targets, and the inference layout of the TensorRT-LLM one."""

    targets: tuple[str, ...] = Field(("trtllm",), min_length=1)
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"  # auto: that of the source

    @field_validator("targets", mode="after")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in TARGETS:
                raise ValueError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
        return value


class Engine(RecipeSection):
    """TensorRT-LLM engines: what they are built for, and what of a GPU their KV cache may take.

    Lengths are in tokens, image tokens included. context_logits: engines give the logits of every
    token of a prompt, as `logits from=engine` needs. vila_path: a clone of VILA, for its tower.
    """

    max_batch_size: int = Field(8, ge=1)
    max_input_len: int = Field(4096, ge=1)
    max_seq_len: int = Field(4608, ge=2)
    kv_cache_free_gpu_memory_fraction: float = Field(0.8, gt=0, lt=1)
    context_logits: bool = False
    vila_path: ExpandedPath | None = None


class Gate(RecipeSection):
    """Largest loss that is still accepted, in points of accuracy against 16 bit."""

    gqa_drop: float | None = Field(None, ge=0, allow_inf_nan=False)


class Evaluate(RecipeSection):
    """Questions answered from the exported checkpoint, or, with from=engine, by the engine."""

    form: Literal["export", "engine"] = Field("export", alias="from")
    tasks: tuple[Literal["gqa", "sight"], ...] = ("gqa", "sight")
    data: ExpandedPath = "scenes"
    limit: int | None = Field(None, ge=1)
    batch: int = Field(64, ge=1)
    gate: Gate = Gate()


class Recipe(RecipeSection):
    """One whole job, from a Hugging Face folder to proven, scored checkpoints."""

    model: ExpandedPath
    workdir: ExpandedPath
    family: str = "auto"
    config: dict[str, Any] = {}  # keys of the model's config.json to override
    stages: tuple[str, ...] = Field(DEFAULT_STAGES, min_length=1)
    parallel: Parallel = Parallel()
    quantize: Quantize = Quantize()
    calibration: Calibration = Calibration()
    export: Export = Export()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()

    @field_validator("stages", mode="after")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in STAGES:
                raise ValueError(f"unknown stage {name!r}; known: {', '.join(STAGES)}")
        return value


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for key, field in model.model_fields.items():
        name = field.alias or key
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _fields(field.annotation, f"{prefix}{name}.")
    return names


def _explain(error: ValidationError) -> str:
    """First problem of a recipe as one line; unknown keys get the nearest known one."""
    problem, known = error.errors()[0], _fields(Recipe)
    parts = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    key = ".".join(parts)
    if problem["type"] != "extra_forbidden" and key not in known and ".".join(parts[:-1]) in known:
        key = ".".join(parts[:-1])  # pydantic adds which kind of value it tried
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown recipe key {key!r}{hint}"
    if problem["type"] == "missing":
        return f"recipe key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"recipe key {key!r}: {message} (got {problem['input']!r})"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes in configs/."""
    here = Path(__file__).resolve().parent
    folders = (here.parent / "configs", here / "configs")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships in configs/.

    Raises:
        UserError: neither; lists the names that ship, or those that are like it.
    """
    path, shipped = Path(name), shipped_recipes()
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    near = sorted(difflib.get_close_matches(name, shipped, n=3))
    known = ", ".join([*near, "..."] if near else sorted(shipped))
    raise UserError(f"recipe {name!r} is no file; recipes that ship: {known}")


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override with `dotted.key=value` words, and validate a recipe.

    Raises:
        UserError: unreadable file, unknown key (with the nearest known), or a value out of range.
    """
    path = recipe_file(name)
    try:
        tree = yaml.load(path.read_text(), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of recipe keys")
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not an override; write key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{word!r} is not an override: {text!r} is not YAML") from None
        _assign(tree, key, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


class _Loader(yaml.SafeLoader):
    """YAML without code, whose mappings have each key once, and keys that are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (TEXT, MERGE):
                raise yaml.YAMLError(f"line {line}: key {key.value!r} is no text")
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: key {key.value!r} comes twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"recipe key {dotted!r}: {key!r} holds a value, not a group of keys")
    tree[last] = value

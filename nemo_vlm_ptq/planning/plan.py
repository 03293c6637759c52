"""The one place where recipe, family, format and parallelism meet; what cannot work stops here.

Reads config.json and the headers of the checkpoint, no weights, and asks for no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import (
    SourceTensor,
    list_tensors,
    model_folder,
    most_common_dtype,
)
from nemo_vlm_ptq.checkpoints.model_config import merge_config, with_dtype
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import Decoder, ModelFamily, find_family, read_config
from nemo_vlm_ptq.formats import INT4_GROUP_SIZES, KV_CACHES, NVFP4_BLOCK, QuantFormat, find_format
from nemo_vlm_ptq.parameter_map.entries import carried_names, check_coverage
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.targets.nemo2.source import is_nemo, open_nemo

TENSOR_SIZES = (1, 2, 4, 8, 16)
VOCAB_MULTIPLE = 64  # Megatron's padding; fixed, so that checkpoints do not depend on the layout
SOURCE_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Plan:
    """A recipe that can run, with everything read from the model's headers."""

    recipe: Recipe
    folder: Path
    config: dict[str, Any]
    family: ModelFamily
    decoder: Decoder
    tensors: dict[str, SourceTensor]
    vision_names: tuple[str, ...]  # names that stay in 16 bit beside the decoder: tower, projector, ...
    dtype: str  # of weights from import to export

    @property
    def formats(self) -> list[QuantFormat]:
        """Rows of the requested formats."""
        return [find_format(name) for name in self.recipe.quantize.format]

    @property
    def export_config(self) -> dict[str, Any]:
        """config.json of what is exported: the model's, in the dtype of its weights."""
        return with_dtype(self.config, self.dtype)

    def targets(self, fmt: QuantFormat) -> list[str]:
        """Requested targets that can take a format together with the KV cache."""
        able = supported_targets(fmt, self.recipe.quantize.kv_cache)
        return [target for target in self.recipe.export.targets if target in able]

    def needs_second_moments(self, fmt: QuantFormat) -> bool:
        """Solving a format searches over scales, and needs second moments."""
        searched = self.recipe.quantize.smoothquant_alpha == "search"
        return fmt.algorithm == "awq" or (fmt.algorithm == "smoothquant" and searched)

    @property
    def second_moments(self) -> bool:
        """A format of the recipe needs second moments."""
        return any(self.needs_second_moments(fmt) for fmt in self.formats)


def supported_targets(fmt: QuantFormat, kv_cache: str) -> tuple[str, ...]:
    """Targets that can take a format together with a KV cache."""
    kv = KV_CACHES.get(kv_cache)
    if kv is None:
        return fmt.targets
    if fmt.weight == "nf4":
        return ()  # bitsandbytes has no place for a cache's scales
    odd = fmt.weight == "nvfp4" and kv.name == "int8"  # TensorRT-LLM has no such engine
    return tuple(
        target
        for target in fmt.targets
        if target in kv.targets and not (odd and target == "trtllm")
    )


def make_plan(recipe: Recipe) -> Plan:
    """Check everything that can be checked without weights.

    Raises:
        UserError: the first thing that cannot work, with the values that would.
    """
    folder = model_folder(recipe.model)
    nemo = open_nemo(folder) if is_nemo(folder) else None
    config = merge_config(read_config(folder) if nemo is None else nemo.config, recipe.config)
    family = find_family(config, recipe.family)
    config = merge_config(family.complete_config(folder, config), recipe.config)
    decoder, vision = _understand(folder, family, config)
    if nemo is None:
        tensors = list_tensors(folder, family.name_aliases, family.subfolders)
    else:
        tensors, folder = nemo.tensors, nemo.folder
    expected = decoder.shapes(family.parameter_map) | vision
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_coverage(found, expected, family.ignored_tensors, str(folder))
    carried = carried_names(found, family.ignored_tensors)
    for name in (*expected, *carried):
        if tensors[name].dtype not in SOURCE_DTYPES:
            raise UserError(
                f"{folder}: tensor {name} is {tensors[name].dtype}; "
                f"a checkpoint to quantize holds {', '.join(SOURCE_DTYPES)}"
            )
    dtype: str = recipe.export.dtype
    if dtype == "auto":
        dtype = SOURCE_DTYPES[
            most_common_dtype(tensors[name] for name in decoder.shapes(family.parameter_map))
        ]
    beside = (*vision, *carried)
    plan = Plan(recipe, folder, config, family, decoder, tensors, beside, dtype)
    _check_quantize(plan)
    _check_nemo(plan)
    for fmt in plan.formats:
        _check_format(plan, fmt)
    _check_layouts(plan)
    return plan


def _understand(
    folder: Path, family: ModelFamily, config: dict[str, Any]
) -> tuple[Decoder, dict[str, tuple[int, ...]]]:
    """Facts of the decoder, and names and shapes of the tower."""
    try:
        return family.decoder(config), family.vision_shapes(config)
    except UserError:
        raise
    except Exception as error:  # transformers' config classes raise all kinds on odd values
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines) or type(error).__name__
        raise UserError(f"{folder}/config.json makes no sense: {reason}") from error


@dataclass(frozen=True)
class _Rule:
    """Something a size must satisfy, and what is wrong when it does not."""

    fits: Callable[[int], bool]
    problem: str
    instead: str = ""  # where no size fits


def _require(key: str, size: int, rules: list[_Rule]) -> None:
    """Refuse a size that breaks a rule, with the sizes that satisfy them all."""
    for rule in rules:
        if not rule.fits(size):
            fitting = [str(s) for s in TENSOR_SIZES if all(other.fits(s) for other in rules)]
            works = ", ".join(fitting) or f"none{rule.instead}"
            raise UserError(f"{key}={size} {rule.problem}; these work: {works}")


def _check_layouts(plan: Plan) -> None:
    decoder, parallel, export = plan.decoder, plan.recipe.parallel, plan.recipe.export
    heads, kv_heads, ffn = decoder.heads, decoder.kv_heads, decoder.ffn

    def serves(tensor: int) -> bool:  # KV heads may be repeated, so that each rank has one
        shared = kv_heads % tensor == 0 or tensor % kv_heads == 0
        return heads % tensor == 0 and ffn % tensor == 0 and shared

    read = [fmt for fmt in plan.formats if "trtllm" in plan.targets(fmt)]
    tiles = [
        _whole_tiles(plan, fmt) if fmt.granularity == "group" else _whole_groups(plan, fmt)
        for fmt in read
        if fmt.grouped
    ]
    stages = _Rule(
        lambda size: decoder.layers % size == 0, f"does not divide {decoder.layers} layers"
    )
    tensor, pipeline = (1 if n == "auto" else n for n in (parallel.tensor, parallel.pipeline))
    _require("parallel.tensor", tensor, _calibrating(plan))
    _require("parallel.pipeline", pipeline, [stages])
    _require("export.tensor", export.tensor, [_Rule(serves, _wide(decoder)), *tiles])
    _require("export.pipeline", export.pipeline, [stages, *_serving_stages(plan)])


def _wide(decoder: Decoder) -> str:
    return (
        f"does not divide {decoder.heads} heads, {decoder.kv_heads} KV heads "
        f"and {decoder.ffn} MLP features"
    )


def _calibrating(plan: Plan) -> list[_Rule]:
    """What a tensor size must satisfy for import, observe and solve."""
    decoder = plan.decoder
    rows = decoder.sizes(VOCAB_MULTIPLE).padded_vocab

    def fits(tensor: int) -> bool:
        return all(
            part % tensor == 0 for part in (decoder.heads, decoder.kv_heads, decoder.ffn, rows)
        )

    grouped = [fmt for fmt in plan.formats if fmt.grouped]
    return [_Rule(fits, _wide(decoder)), *(_whole_groups(plan, fmt) for fmt in grouped)]


def calibration_tensor_sizes(plan: Plan) -> list[int]:
    """Tensor sizes that calibrate with every format of the recipe."""
    return [size for size in TENSOR_SIZES if all(rule.fits(size) for rule in _calibrating(plan))]


def _serving_stages(plan: Plan) -> list[_Rule]:
    """TensorRT-LLM's Phi-3 has no pipeline parallelism: every rank holds both ends."""
    phi = plan.family.trtllm_architecture == "Phi3ForCausalLM"
    if not phi or not any("trtllm" in plan.targets(fmt) for fmt in plan.formats):
        return []
    return [_Rule(lambda size: size == 1, "is not possible for Phi3ForCausalLM in TensorRT-LLM")]


def _whole_groups(plan: Plan, fmt: QuantFormat) -> _Rule:
    """Every rank holds whole groups of the inputs of each linear."""
    decoder, group = plan.decoder, fmt.group(plan.recipe.quantize.group_size)
    query = decoder.heads * decoder.head_dim

    def fits(tensor: int) -> bool:
        cut = all(width % (group * tensor) == 0 for width in (query, decoder.ffn))
        return cut and decoder.hidden % group == 0

    return _Rule(fits, f"cuts a group of {group} of format {fmt.name}")


def _whole_tiles(plan: Plan, fmt: QuantFormat) -> _Rule:
    """TensorRT-LLM pads group-wise linears to tiles of 128 a rank, and then refuses the shapes."""
    decoder, group = plan.decoder, plan.recipe.quantize.group_size
    query = decoder.heads * decoder.head_dim
    merged = query + 2 * decoder.kv_heads * decoder.head_dim

    def fits(tensor: int) -> bool:
        sizes = (decoder.hidden, decoder.ffn, query, merged)
        return all(size % (max(group, 128) * tensor) == 0 for size in sizes)

    problem = f"cuts a group of {group} of format {fmt.name}, or a tile of TensorRT-LLM"
    return _Rule(fits, problem, "; leave trtllm out of export.targets")


def _check_quantize(plan: Plan) -> None:
    """What the recipe says for all formats fits the model and the data."""
    wanted, head_dim = plan.recipe.quantize, plan.decoder.head_dim
    if wanted.kv_cache == "nvfp4" and head_dim % NVFP4_BLOCK:
        raise UserError(
            f"quantize.kv_cache=nvfp4 needs heads of whole blocks of {NVFP4_BLOCK}, this model's "
            f"have {head_dim} features; these work: none, fp8, int8"
        )
    if wanted.image_share is not None and plan.recipe.calibration.modality == "text":
        raise UserError(
            f"quantize.image_share={wanted.image_share} needs image tokens, and "
            "calibration.modality=text brings none; leave it out or set modality=image_text"
        )


def _check_nemo(plan: Plan) -> None:
    """NeMo has a class for the model, and a place for what is quantized."""
    if "nemo" not in plan.recipe.export.targets:
        return
    others = [one for one in plan.recipe.export.targets if one != "nemo"] or ["trtllm"]
    instead = f"leave nemo out of export.targets, e.g. export.targets=[{', '.join(others)}]"
    if not plan.family.nemo_supported:
        raise UserError(
            f"NeMo's form is written for the family llava, not {plan.family.name}; {instead}"
        )
    if plan.recipe.quantize.kv_cache != "none":
        raise UserError(
            f"NeMo's form has no place for quantize.kv_cache={plan.recipe.quantize.kv_cache}; "
            f"set quantize.kv_cache=none, or {instead}"
        )


def _check_format(plan: Plan, fmt: QuantFormat) -> None:
    group, targets = plan.recipe.quantize.group_size, plan.targets(fmt)
    if not targets:
        raise UserError(_no_target(plan.recipe, fmt))
    kernels = [
        INT4_GROUP_SIZES[one] for one in targets if one in INT4_GROUP_SIZES and fmt.weight == "int4"
    ]
    sizes = sorted(set(kernels[0]).intersection(*kernels)) if kernels else [group]
    sizes = sizes if fmt.second_weight is None else [128]
    if plan.dtype == "float32" and "compressed_tensors" in targets and fmt.weight == "int4":
        raise UserError(
            f"readers of compressed_tensors take {fmt.name} in 16 bit, and this model is float32; "
            "set export.dtype=bfloat16 or float16"
        )
    if group not in sizes:
        works = f"quantize.group_size={' or '.join(map(str, sizes))}"
        raise UserError(f"format {fmt.name} needs {works}, got {group}")


def _no_target(recipe: Recipe, fmt: QuantFormat) -> str:
    """Why none of the requested targets takes a format, and what would."""
    asked, kv_cache = ", ".join(recipe.export.targets), recipe.quantize.kv_cache
    if not set(fmt.targets) & set(recipe.export.targets):
        return (
            f"format {fmt.name} cannot be exported to {asked}; it can to: {', '.join(fmt.targets)}"
        )
    caches = [
        name
        for name in ("none", *KV_CACHES)
        if set(supported_targets(fmt, name)) & set(recipe.export.targets)
    ]
    return (
        f"format {fmt.name} with quantize.kv_cache={kv_cache} cannot be exported to {asked}; "
        f"these KV caches can: {', '.join(caches)}"
    )

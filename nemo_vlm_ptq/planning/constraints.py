"""Constraints between recipe and model: parallel sizes, group sizes, formats and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nemo_vlm_ptq.constants import BLOCK_FEATURES, VOCAB_MULTIPLE
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import Decoder
from nemo_vlm_ptq.formats import KV_CACHES, NVFP4_BLOCK, QuantFormat
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.targets.registry import TARGETS, supported_targets

TENSOR_SIZES = (1, 2, 4, 8, 16)
TRTLLM_TILE = 128  # features that TensorRT-LLM pads the linears of a rank to


@dataclass(frozen=True, kw_only=True)
class _Constraint:
    """A condition on a parallel size.

    accepts: whether a size satisfies it; problem: the message if it does not; hint: advice where no
    size satisfies it.
    """

    accepts: Callable[[int], bool]
    problem: str
    hint: str = ""


def check_constraints(plan: Plan) -> None:
    """Check a plan against all constraints.

    Raises:
        UserError: the first violated constraint, with the values that satisfy it.
    """
    _check_quantize(plan)
    _check_max_pixels(plan)
    _check_trtllm(plan)
    _check_nemo(plan)
    for fmt in plan.formats:
        _check_format(plan, fmt)
    _check_parallel_sizes(plan)
    _check_window(plan)


def calibration_tensor_sizes(plan: Plan) -> list[int]:
    """Return the tensor-parallel sizes that can calibrate every format of the recipe."""
    constraints = _calibration_constraints(plan)
    return [size for size in TENSOR_SIZES if all(one.accepts(size) for one in constraints)]


def _require(key: str, size: int, constraints: list[_Constraint]) -> None:
    """Reject a size that violates a constraint, with the sizes that satisfy them all."""
    for constraint in constraints:
        if not constraint.accepts(size):
            sizes = [str(s) for s in TENSOR_SIZES if all(one.accepts(s) for one in constraints)]
            supported = ", ".join(sizes) or f"none{constraint.hint}"
            raise UserError(f"{key}={size} {constraint.problem}; supported: {supported}")


def _check_parallel_sizes(plan: Plan) -> None:
    decoder, parallel, export = plan.decoder, plan.recipe.parallel, plan.recipe.export
    heads, ffn, kv_counts = decoder.heads, decoder.ffn, decoder.kv_head_counts

    def can_serve(tensor: int) -> bool:  # KV heads may be replicated, so that each rank has one
        shared = all(count % tensor == 0 or tensor % count == 0 for count in kv_counts)
        return heads % tensor == 0 and ffn % tensor == 0 and shared

    tiles = [
        _tile_constraint(plan, fmt) if fmt.granularity == "group" else _group_constraint(plan, fmt)
        for fmt in plan.formats
        if "trtllm" in plan.targets(fmt) and fmt.grouped
    ]
    deepest = decoder.deepstack_layers
    stages = _Constraint(
        accepts=lambda size: decoder.layers % size == 0 and decoder.layers // size >= deepest,
        problem=f"does not divide {decoder.layers} layers"
        + f" into stages of at least {deepest}" * bool(deepest),
    )
    serving = _Constraint(accepts=can_serve, problem=_indivisible(decoder))
    tensor, pipeline = (1 if n == "auto" else n for n in (parallel.tensor, parallel.pipeline))
    _require("parallel.tensor", tensor, _calibration_constraints(plan))
    _require("parallel.pipeline", pipeline, [stages])
    _require("export.tensor", export.tensor, [serving, *tiles])
    _require("export.pipeline", export.pipeline, [stages, *_serving_pipeline(plan)])


def _check_window(plan: Plan) -> None:
    window, pipeline = plan.recipe.calibration.window, plan.recipe.parallel.pipeline
    layers = plan.decoder.layers // (1 if pipeline == "auto" else pipeline)
    if window != "auto" and window > layers:
        raise UserError(
            f"calibration.window={window}, but a pipeline stage has {layers} layers; supported: "
            f"auto, 1 to {layers}"
        )


def _indivisible(decoder: Decoder) -> str:
    kv_heads = " and ".join(map(str, decoder.kv_head_counts))
    return (
        f"does not divide {decoder.heads} heads, {kv_heads} KV heads and {decoder.ffn} MLP features"
    )


def _calibration_constraints(plan: Plan) -> list[_Constraint]:
    """Return the constraints on the tensor-parallel size of import, observe and solve."""
    decoder = plan.decoder
    vocab = decoder.sizes(VOCAB_MULTIPLE).padded_vocab
    sharded = (decoder.heads, *decoder.kv_head_counts, decoder.ffn, vocab)
    divides = _Constraint(
        accepts=lambda tensor: all(size % tensor == 0 for size in sharded),
        problem=_indivisible(decoder),
    )
    grouped = [fmt for fmt in plan.formats if fmt.grouped]
    return [divides, *(_group_constraint(plan, fmt) for fmt in grouped)]


def _serving_pipeline(plan: Plan) -> list[_Constraint]:
    """TensorRT-LLM's Phi-3 has no pipeline parallelism: every rank holds embedding and head."""
    phi = plan.family.trtllm_architecture == "Phi3ForCausalLM"
    if not phi or not any("trtllm" in plan.targets(fmt) for fmt in plan.formats):
        return []
    problem = "is not supported for Phi3ForCausalLM in TensorRT-LLM"
    return [_Constraint(accepts=lambda size: size == 1, problem=problem)]


def _group_constraint(plan: Plan, fmt: QuantFormat) -> _Constraint:
    """Every rank holds whole groups of the inputs of each linear."""
    decoder, group = plan.decoder, fmt.group(plan.recipe.quantize.group_size)
    widths = (*(decoder.heads * shape.head_dim for shape in decoder.attention_kinds), decoder.ffn)

    def accepts(tensor: int) -> bool:
        sharded = all(width % (group * tensor) == 0 for width in widths)
        return sharded and decoder.hidden % group == 0

    return _Constraint(accepts=accepts, problem=f"splits a group of {group} of format {fmt.name}")


def _tile_constraint(plan: Plan, fmt: QuantFormat) -> _Constraint:
    """TensorRT-LLM pads group-wise linears to tiles per rank, and then rejects the shapes."""
    decoder, group = plan.decoder, plan.recipe.quantize.group_size
    query = decoder.heads * decoder.head_dim
    qkv = query + 2 * decoder.kv_heads * decoder.head_dim

    def accepts(tensor: int) -> bool:
        sizes = (decoder.hidden, decoder.ffn, query, qkv)
        return all(size % (max(group, TRTLLM_TILE) * tensor) == 0 for size in sizes)

    return _Constraint(
        accepts=accepts,
        problem=f"splits a group of {group} of format {fmt.name}, or a tile of TensorRT-LLM",
        hint="; remove trtllm from export.targets",
    )


def _check_quantize(plan: Plan) -> None:
    """Check what the recipe says for all formats against the model and the data."""
    quantize = plan.recipe.quantize
    for head_dim in [shape.head_dim for shape in plan.decoder.attention_kinds]:
        if quantize.kv_cache != "nvfp4" or head_dim % NVFP4_BLOCK == 0:
            continue
        raise UserError(
            f"quantize.kv_cache=nvfp4 needs a head_dim that is a multiple of {NVFP4_BLOCK}, and "
            f"this model's is {head_dim}; supported: none, fp8, int8"
        )
    if quantize.image_share is not None and plan.recipe.calibration.modality == "text":
        raise UserError(
            f"quantize.image_share={quantize.image_share} needs image tokens, and "
            "calibration.modality=text has none; remove it or set modality=image_text"
        )


def _check_max_pixels(plan: Plan) -> None:
    """Check that the largest image of calibration is at least one token."""
    pixels, area = plan.recipe.calibration.max_pixels, plan.family.pixels_per_token
    if area is not None and pixels < area(plan.config):
        raise UserError(
            f"calibration.max_pixels={pixels} is less than the {area(plan.config)} pixels of a "
            "token of this model"
        )


def _check_trtllm(plan: Plan) -> None:
    """Check that TensorRT-LLM's engines know the decoder."""
    if "trtllm" in plan.recipe.export.targets and not plan.family.trtllm_architecture:
        raise UserError(
            f"target trtllm does not support the family {plan.family.name}: TensorRT-LLM builds no "
            "engines of it; use export.targets=[hf], which its PyTorch backend loads"
        )


def _check_nemo(plan: Plan) -> None:
    """Check that NeMo 2 has a class for the model, and a place for what is quantized."""
    if "nemo" not in plan.recipe.export.targets:
        return
    others = [one for one in plan.recipe.export.targets if one != "nemo"] or ["compressed_tensors"]
    hint = f"remove nemo from export.targets, e.g. export.targets=[{', '.join(others)}]"
    if not plan.family.nemo_supported:
        raise UserError(
            f"target nemo supports the family llava, and this model is {plan.family.name}; {hint}"
        )
    if plan.recipe.quantize.kv_cache != "none":
        raise UserError(
            f"target nemo does not support quantize.kv_cache={plan.recipe.quantize.kv_cache}; "
            f"set quantize.kv_cache=none, or {hint}"
        )


def _check_format(plan: Plan, fmt: QuantFormat) -> None:
    group, targets = plan.recipe.quantize.group_size, plan.targets(fmt)
    if not targets:
        raise UserError(_no_target(plan.recipe, fmt))
    recipe = plan.recipe
    evaluates = "evaluate" in recipe.stages and recipe.evaluate.form == "export"
    if evaluates and not plan.readable_targets(fmt):
        raise UserError(
            f"evaluate cannot run {fmt.name} from {', '.join(targets)}; add "
            f"{supported_targets(fmt, recipe.quantize.kv_cache)[0]} to export.targets, or remove "
            "evaluate from stages"
        )
    if fmt.weight != "int4":
        return
    specs = [TARGETS[target] for target in targets]
    if plan.dtype == "float32" and any(spec.int_scales_in_model_dtype for spec in specs):
        raise UserError(
            f"compressed_tensors stores {fmt.name} in 16 bit models only, and this model is "
            "float32; set export.dtype=bfloat16 or float16"
        )
    kernels = [spec.int4_group_sizes for spec in specs if spec.int4_group_sizes]
    sizes = sorted(set(kernels[0]).intersection(*kernels)) if kernels else [group]
    if fmt.second_weight is not None:
        sizes = [128]
    if group not in sizes:
        supported = f"quantize.group_size={' or '.join(map(str, sizes))}"
        raise UserError(f"format {fmt.name} needs {supported}, got {group}")
    if fmt.granularity == "group" and plan.moments_for(fmt) and BLOCK_FEATURES % group:
        raise UserError(
            f"format {fmt.name} clips groups of 16, 32, 64 or 128 inputs, got "
            f"quantize.group_size={group}"
        )


def _no_target(recipe: Recipe, fmt: QuantFormat) -> str:
    """Return why none of the requested targets stores a format, and what would."""
    requested, kv_cache = recipe.export.targets, recipe.quantize.kv_cache
    names, supported = ", ".join(requested), supported_targets(fmt)
    if not set(supported) & set(requested):
        return f"format {fmt.name} cannot be exported to {names}; supported: {', '.join(supported)}"
    caches = [
        name for name in ("none", *KV_CACHES) if set(supported_targets(fmt, name)) & set(requested)
    ]
    return (
        f"format {fmt.name} with quantize.kv_cache={kv_cache} cannot be exported to {names}; "
        f"supported KV caches: {', '.join(caches)}"
    )

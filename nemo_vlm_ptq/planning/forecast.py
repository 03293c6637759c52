"""What a plan costs, from shapes alone: parameters and bytes a rank, statistics, output."""

from __future__ import annotations

import math

from nemo_vlm_ptq.checkpoints.huggingface import total_bytes
from nemo_vlm_ptq.distributed.layout import strip_entries
from nemo_vlm_ptq.planning.plan import VOCAB_MULTIPLE, Plan, calibration_tensor_sizes

MAX_IMAGE_TOKENS = 2880  # tokens, at most, of an image that is cut up: LLaVA-NeXT's
TEXT_TOKENS = 128  # tokens of a sample beside its image: a prompt, a long question, a short answer
PREFETCH_MICRO_BATCHES = 8  # micro-batches whose images are looked at together
MEMORY_FRACTION = (
    0.9  # of the memory left free that second moments take unless the recipe says how much
)


def describe_plan(plan: Plan, why: str = "") -> str:
    """The plan as text: what would be read, held per rank, and written.

    Args:
        plan: its layout is in numbers, data parallel apart.
        why: said behind the layout.
    """
    recipe, decoder = plan.recipe, plan.decoder
    total = sum(math.prod(plan.tensors[name].shape) for name in used_names(plan))
    lines = [
        f"model      {plan.folder}  ({plan.family.name}, {total / 1e6:,.1f} M parameters, "
        f"{total_bytes(plan.tensors) / 1e6:,.1f} MB, {plan.dtype})",
        f"decoder    {decoder.layers} layers, hidden {decoder.hidden}, {decoder.heads} heads, "
        f"{decoder.kv_heads} KV heads, MLP {decoder.ffn}, vocabulary {decoder.vocab}",
        f"calibrate  TP {recipe.parallel.tensor} x PP {recipe.parallel.pipeline} x "
        f"DP {recipe.parallel.data}{': ' + why if why else ''}",
        *_ranks(plan),
    ]
    if plan.second_moments:
        lines.append(_moments(plan))
    linear = linear_parameters(plan)
    export = recipe.export
    for fmt in plan.formats:
        size, targets = linear * fmt.bits / 8 + 2 * (total - linear), plan.targets(fmt)
        line = (
            f"{fmt.name:14} -> {', '.join(targets)}: about {size / 1e6:,.1f} MB, "
            f"{size / (2 * total):.2f} of 16 bit"
        )
        served = f"; TensorRT-LLM ranks: TP {export.tensor} x PP {export.pipeline}"
        lines.append(line + served * ("trtllm" in targets))
    return "\n".join(lines)


def used_names(plan: Plan) -> list[str]:
    """Source tensors that are used: the decoder's and those beside it."""
    return [*plan.decoder.shapes(plan.family.parameter_map), *plan.vision_names]


def rank_parameters(plan: Plan, tensor: int, pipeline: int = 1, *, head: bool = True) -> int:
    """Parameters of the decoder of the fullest stage, the vocabulary padded as Megatron does.

    Norms are whole on every tensor rank; everything else is cut.
    """
    decoder = plan.decoder
    padding = decoder.sizes(VOCAB_MULTIPLE).padded_vocab - decoder.vocab
    layers, first, last = 0, 0, 0
    for row in plan.family.parameter_map:
        whole = sum(math.prod(shape) for shape in decoder.shapes((row,)).values())
        if row.sharding == "vocab":
            whole += padding * decoder.hidden
        own = whole if row.sharding == "replicate" else whole // tensor
        if row.per_layer:
            layers += own // pipeline
        elif row.module_name == "word_embeddings":
            first += own
        elif head:
            last += own
    return layers + (first + last if pipeline == 1 else max(first, last))


def observe_bytes(plan: Plan, tensor: int, pipeline: int = 1) -> int:
    """About what a rank holds at the height of observe, on the stage that holds most.

    Weights but the head, tower and projector, what `working_bytes` says, and the second moments of
    one layer where a format needs them.
    """
    moments = _layer_moments(plan, tensor) / MEMORY_FRACTION if plan.second_moments else 0
    return int(_held(plan, tensor, pipeline) + working_bytes(plan, tensor) + moments)


def working_bytes(plan: Plan, tensor: int) -> int:
    """About what a rank takes beside weights and second moments while it observes.

    A micro-batch inside one layer, image features that lie ready, and a layer's second moments on
    their way into a file.
    """
    decoder, batch = plan.decoder, plan.recipe.calibration.micro_batch
    query, image = decoder.heads * decoder.head_dim, plan.family.tokens_per_image
    tokens = batch * ((image(plan.config) if image else MAX_IMAGE_TOKENS) + TEXT_TOKENS)
    wide = (decoder.ffn + query) // tensor
    gathered = max(decoder.ffn, query) if tensor > 1 else 0
    inside = 6 * decoder.hidden + 3 * wide + gathered
    ready = PREFETCH_MICRO_BATCHES * decoder.hidden
    moments = _layer_moments(plan, 1) if plan.second_moments else 0
    return dtype_bytes(plan) * tokens * (inside + ready) + moments


def second_moment_bytes(plan: Plan, tensor: int, pipeline: int = 1, runs: int = 1) -> int:
    """About what a rank holds while it gathers its layers' second moments in `runs` passes."""
    layers = math.ceil(plan.decoder.layers / pipeline / runs)
    moments = layers * _layer_moments(plan, tensor)
    return _held(plan, tensor, pipeline) + working_bytes(plan, tensor) + moments


def count_passes(plan: Plan, tensor: int, pipeline: int, memory: int) -> int:
    """Times that observe runs over the data with so many bytes of GPU a rank."""
    if not plan.second_moments:
        return 1
    left = memory - _held(plan, tensor, pipeline) - working_bytes(plan, tensor)
    room = plan.recipe.calibration.max_statistics_memory or MEMORY_FRACTION * left
    fitting = max(1, room // _layer_moments(plan, tensor))
    return math.ceil(plan.decoder.layers / pipeline / fitting)


def _held(plan: Plan, tensor: int, pipeline: int) -> int:
    """Bytes of a rank's weights but the head, of the tower and of the projector."""
    own = rank_parameters(plan, tensor, pipeline, head=False)
    return dtype_bytes(plan) * (own + vision_parameters(plan))


def dtype_bytes(plan: Plan) -> int:
    """Bytes of a parameter."""
    return 4 if plan.dtype == "float32" else 2


def vision_parameters(plan: Plan) -> int:
    """Parameters of tower and projector, which every rank holds whole."""
    return sum(math.prod(plan.tensors[name].shape) for name in plan.vision_names)


def full_model_bytes(plan: Plan, width: int) -> int:
    """Bytes of decoder, tower and projector on one device, `width` bytes a parameter."""
    return width * (rank_parameters(plan, 1) + vision_parameters(plan))


def linear_parameters(plan: Plan) -> int:
    """Parameters that the formats quantize."""
    shapes = plan.decoder.shapes(tuple(row for row in plan.family.parameter_map if row.is_linear))
    return sum(math.prod(shape) for shape in shapes.values())


def _ranks(plan: Plan) -> list[str]:
    """A line for each tensor size that works: what one rank holds, at one pipeline stage."""
    beside, width, lines = vision_parameters(plan), dtype_bytes(plan), []
    for tensor in calibration_tensor_sizes(plan):
        own = rank_parameters(plan, tensor)
        lines.append(
            f"           TP {tensor:<2} {own / 1e6:>9,.1f} M parameters a rank, "
            f"{own * width / 1e6:>9,.1f} MB; tower and projector {beside * width / 1e6:,.1f} MB; "
            f"observe {observe_bytes(plan, tensor) / 1e9:,.1f} GB"
        )
    return lines


def _layer_moments(plan: Plan, tensor: int) -> int:
    """Bytes of one layer's second moments while they are summed, on tensor rank 0."""
    decoder = plan.decoder
    widths = (decoder.hidden, decoder.heads * decoder.head_dim, decoder.hidden, decoder.ffn)
    return 2 * 8 * sum(strip_entries(width, 0, tensor) for width in widths)


def _moments(plan: Plan) -> str:
    """What a rank holds if all its layers are observed in one pass, and what is written."""
    parallel, layers = plan.recipe.parallel, plan.decoder.layers
    own = layers // int(parallel.pipeline) * _layer_moments(plan, int(parallel.tensor))
    disk = layers * _layer_moments(plan, 1) / 2  # as float32
    return (
        f"           second moments: {own / 1e6:,.1f} MB a rank, or several passes; "
        f"{disk / 1e6:,.1f} MB on disk"
    )

"""What a plan costs, from shapes alone: parameters and bytes a rank, statistics, output."""

from __future__ import annotations

import math

from nemo_vlm_ptq.parallel import strip_entries
from nemo_vlm_ptq.plan import VOCAB_MULTIPLE, Plan, calibrating_sizes
from nemo_vlm_ptq.source import total_bytes

LONG_IMAGE = 2880  # tokens, at most, of an image that is cut up: LLaVA-NeXT's
TEXT = 128  # tokens of a sample beside its image: a prompt, a long question, a short answer
WINDOW = 8  # micro-batches whose images are looked at together
SHARE = 0.9  # of the memory left free that second moments take unless the recipe says how much


def describe(plan: Plan, why: str = "") -> str:
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
    return [*plan.decoder.shapes(plan.family.rows), *plan.vision]


def rank_parameters(plan: Plan, tensor: int, pipeline: int = 1, *, head: bool = True) -> int:
    """Parameters of the decoder of the fullest stage, the vocabulary padded as Megatron does.

    Norms are whole on every tensor rank; everything else is cut.
    """
    decoder = plan.decoder
    padding = decoder.sizes(VOCAB_MULTIPLE).vocab_rows - decoder.vocab
    layers, first, last = 0, 0, 0
    for row in plan.family.rows:
        whole = sum(math.prod(shape) for shape in decoder.shapes((row,)).values())
        if row.layout == "vocab":
            whole += padding * decoder.hidden
        own = whole if row.layout == "replicate" else whole // tensor
        if row.layered:
            layers += own // pipeline
        elif row.short == "word_embeddings":
            first += own
        elif head:
            last += own
    return layers + (first + last if pipeline == 1 else max(first, last))


def observe_bytes(plan: Plan, tensor: int, pipeline: int = 1) -> int:
    """About what a rank holds at the height of observe, on the stage that holds most.

    Weights but the head, tower and projector, what `working_bytes` says, and the second moments of
    one layer where a format needs them.
    """
    moments = _layer_moments(plan, tensor) / SHARE if plan.second_moments else 0
    return int(_held(plan, tensor, pipeline) + working_bytes(plan, tensor) + moments)


def working_bytes(plan: Plan, tensor: int) -> int:
    """About what a rank takes beside weights and second moments while it observes.

    A micro-batch inside one layer, image features that lie ready, and a layer's second moments on
    their way into a file.
    """
    decoder, batch = plan.decoder, plan.recipe.calibration.micro_batch
    query, image = decoder.heads * decoder.head_dim, plan.family.image_tokens
    tokens = batch * ((image(plan.config) if image else LONG_IMAGE) + TEXT)
    wide = (decoder.ffn + query) // tensor
    gathered = max(decoder.ffn, query) if tensor > 1 else 0
    inside = 6 * decoder.hidden + 3 * wide + gathered
    ready = WINDOW * decoder.hidden
    moments = _layer_moments(plan, 1) if plan.second_moments else 0
    return dtype_bytes(plan) * tokens * (inside + ready) + moments


def moments_bytes(plan: Plan, tensor: int, pipeline: int = 1, runs: int = 1) -> int:
    """About what a rank holds while it gathers its layers' second moments in `runs` passes."""
    layers = math.ceil(plan.decoder.layers / pipeline / runs)
    moments = layers * _layer_moments(plan, tensor)
    return _held(plan, tensor, pipeline) + working_bytes(plan, tensor) + moments


def passes(plan: Plan, tensor: int, pipeline: int, memory: int) -> int:
    """Times that observe runs over the data with so many bytes of GPU a rank."""
    if not plan.second_moments:
        return 1
    left = memory - _held(plan, tensor, pipeline) - working_bytes(plan, tensor)
    room = plan.recipe.calibration.max_statistics_memory or SHARE * left
    fitting = max(1, room // _layer_moments(plan, tensor))
    return math.ceil(plan.decoder.layers / pipeline / fitting)


def _held(plan: Plan, tensor: int, pipeline: int) -> int:
    """Bytes of a rank's weights but the head, of the tower and of the projector."""
    own = rank_parameters(plan, tensor, pipeline, head=False)
    return dtype_bytes(plan) * (own + beside_parameters(plan))


def dtype_bytes(plan: Plan) -> int:
    """Bytes of a parameter."""
    return 4 if plan.dtype == "float32" else 2


def beside_parameters(plan: Plan) -> int:
    """Parameters of tower and projector, which every rank holds whole."""
    return sum(math.prod(plan.tensors[name].shape) for name in plan.vision)


def whole_bytes(plan: Plan, width: int) -> int:
    """Bytes of decoder, tower and projector on one device, `width` bytes a parameter."""
    return width * (rank_parameters(plan, 1) + beside_parameters(plan))


def linear_parameters(plan: Plan) -> int:
    """Parameters that the formats quantize."""
    shapes = plan.decoder.shapes(tuple(row for row in plan.family.rows if row.linear))
    return sum(math.prod(shape) for shape in shapes.values())


def _ranks(plan: Plan) -> list[str]:
    """A line for each tensor size that works: what one rank holds, at one pipeline stage."""
    beside, width, lines = beside_parameters(plan), dtype_bytes(plan), []
    for tensor in calibrating_sizes(plan):
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

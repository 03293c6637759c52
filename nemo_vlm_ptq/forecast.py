"""What a plan costs, from shapes alone: parameters and bytes a rank, statistics, output."""

from __future__ import annotations

import math

from nemo_vlm_ptq.parallel import strip_entries
from nemo_vlm_ptq.plan import VOCAB_MULTIPLE, Plan, calibrating_sizes
from nemo_vlm_ptq.source import total_bytes


def describe(plan: Plan) -> str:
    """The plan as text: what would be read, held per rank, and written."""
    recipe, decoder = plan.recipe, plan.decoder
    total = sum(math.prod(plan.tensors[name].shape) for name in used_names(plan))
    lines = [
        f"model      {plan.folder}  ({plan.family.name}, {total / 1e6:,.1f} M parameters, "
        f"{total_bytes(plan.tensors) / 1e6:,.1f} MB, {plan.dtype})",
        f"decoder    {decoder.layers} layers, hidden {decoder.hidden}, {decoder.heads} heads, "
        f"{decoder.kv_heads} KV heads, MLP {decoder.ffn}, vocabulary {decoder.vocab}",
        f"calibrate  TP {recipe.parallel.tensor} x PP {recipe.parallel.pipeline} x "
        f"DP {recipe.parallel.data}",
        *_ranks(plan),
    ]
    if any(fmt.second_moments for fmt in plan.formats):
        lines.append(_moments(plan))
    linear = linear_parameters(plan)
    export = recipe.export
    for fmt in plan.formats:
        size = linear * fmt.bits / 8 + 2 * (total - linear)
        lines.append(
            f"{fmt.name:10} -> {', '.join(plan.targets(fmt))}: about {size / 1e6:,.1f} MB, "
            f"{size / (2 * total):.2f} of 16 bit; TensorRT-LLM ranks: "
            f"TP {export.tensor} x PP {export.pipeline}"
        )
    return "\n".join(lines)


def used_names(plan: Plan) -> list[str]:
    """Source tensors that are used: the decoder's and those beside it."""
    return [*plan.decoder.shapes(plan.family.rows), *plan.vision]


def rank_parameters(plan: Plan, tensor: int) -> int:
    """Parameters of the decoder on one of `tensor` ranks, the vocabulary padded as Megatron does.

    Norms are whole on every rank; everything else is cut.
    """
    decoder = plan.decoder
    padding = decoder.sizes(VOCAB_MULTIPLE).vocab_rows - decoder.vocab
    count = 0
    for row in plan.family.rows:
        whole = sum(math.prod(shape) for shape in decoder.shapes((row,)).values())
        if row.layout == "vocab":
            whole += padding * decoder.hidden
        count += whole if row.layout == "replicate" else whole // tensor
    return count


def linear_parameters(plan: Plan) -> int:
    """Parameters that the formats quantize."""
    shapes = plan.decoder.shapes(tuple(row for row in plan.family.rows if row.linear))
    return sum(math.prod(shape) for shape in shapes.values())


def _ranks(plan: Plan) -> list[str]:
    """A line for each tensor size that works: what one rank holds, at one pipeline stage."""
    beside = sum(math.prod(plan.tensors[name].shape) for name in plan.vision)
    width = 4 if plan.dtype == "float32" else 2
    lines = []
    for tensor in calibrating_sizes(plan):
        own = rank_parameters(plan, tensor)
        lines.append(
            f"           TP {tensor:<2} {own / 1e6:>9,.1f} M parameters a rank, "
            f"{own * width / 1e6:>9,.1f} MB; tower and projector {beside * width / 1e6:,.1f} MB"
        )
    return lines


def _moments(plan: Plan) -> str:
    """What a rank holds if all its layers are observed in one pass, and what is written."""
    decoder, parallel = plan.decoder, plan.recipe.parallel
    widths = (decoder.hidden, decoder.heads * decoder.head_dim, decoder.hidden, decoder.ffn)
    own = sum(strip_entries(width, 0, parallel.tensor) for width in widths)
    disk = sum(strip_entries(width, 0, 1) for width in widths)
    return (
        f"           second moments: {2 * 8 * decoder.layers * own / parallel.pipeline / 1e6:,.1f} "
        f"MB a rank, or several passes; {2 * 4 * decoder.layers * disk / 1e6:,.1f} MB on disk"
    )

"""Forecast of a plan's memory use and output size, from tensor shapes alone.

It is made before any rank is started. It counts the large tensors only; the automatic layout and
the observe stage leave a margin for the rest.
"""

from __future__ import annotations

import math

from nemo_vlm_ptq.checkpoints.huggingface import total_bytes
from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.distributed.moment_strips import strip_numel
from nemo_vlm_ptq.planning.constraints import calibration_tensor_sizes
from nemo_vlm_ptq.planning.plan import Plan

MAX_IMAGE_TOKENS = 2880  # per image, for families whose number depends on the size: LLaVA-NeXT's
TEXT_TOKENS = 128  # per sample: prompt, a long question, a short answer
PREFETCH_MICRO_BATCHES = 8  # micro-batches whose images are encoded in advance
# Fraction of the free memory that second moments use unless the recipe limits them.
SECOND_MOMENT_MEMORY_FRACTION = 0.9
MODALITIES = 2  # text and image, with second moments of their own
FLOAT64_BYTES = 8  # per element of a second moment while it is summed


def describe_plan(plan: Plan, layout_reason: str = "") -> str:
    """Return the plan as text: what is read, held per rank, and written.

    Args:
        plan: a plan with a resolved layout; only the data-parallel size may be `auto`.
        layout_reason: why the layout was chosen; printed after it.
    """
    recipe, decoder = plan.recipe, plan.decoder
    total = sum(math.prod(plan.tensors[name].shape) for name in used_tensor_names(plan))
    lines = [
        f"model      {plan.folder}  ({plan.family.name}, {total / 1e6:,.1f} M parameters, "
        f"{total_bytes(plan.tensors) / 1e6:,.1f} MB, {plan.dtype})",
        f"decoder    {decoder.layers} layers, hidden {decoder.hidden}, {decoder.heads} heads, "
        f"{decoder.kv_heads} KV heads, MLP {decoder.ffn}, vocabulary {decoder.vocab}",
        f"calibrate  TP {recipe.parallel.tensor} x PP {recipe.parallel.pipeline} x "
        f"DP {recipe.parallel.data}{': ' + layout_reason if layout_reason else ''}",
        *_describe_tensor_sizes(plan),
    ]
    if plan.second_moments:
        lines.append(_describe_second_moments(plan))
    linear = linear_parameters(plan)
    export = recipe.export
    for fmt in plan.formats:
        size, targets = linear * fmt.bits / 8 + 2 * (total - linear), plan.targets(fmt)
        line = (
            f"{fmt.name:14} -> {', '.join(targets)}: about {size / 1e6:,.1f} MB, "
            f"{size / (2 * total):.2f} of 16 bit"
        )
        serving_layout = f"; TensorRT-LLM ranks: TP {export.tensor} x PP {export.pipeline}"
        lines.append(line + serving_layout * ("trtllm" in targets))
    return "\n".join(lines)


def used_tensor_names(plan: Plan) -> list[str]:
    """List the source tensors in use: decoder, vision tower and projector."""
    return [*plan.decoder.shapes(plan.family.parameter_map), *plan.vision_names]


def rank_parameters(plan: Plan, tensor: int, pipeline: int = 1, *, head: bool = True) -> int:
    """Return the decoder parameters per rank of the fullest pipeline stage.

    The vocabulary is padded as in Megatron. Norms are replicated over tensor ranks; everything
    else is sharded.

    Args:
        plan: the plan.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        head: whether to count the final norm and the output layer.
    """
    decoder = plan.decoder
    padding = decoder.sizes(VOCAB_MULTIPLE).padded_vocab - decoder.vocab
    layers, embedding, output = 0, 0, 0
    for entry in plan.family.parameter_map:
        full = sum(math.prod(shape) for shape in decoder.shapes((entry,)).values())
        if entry.sharding == "vocab":
            full += padding * decoder.hidden
        shard = full if entry.sharding == "replicate" else full // tensor
        if entry.per_layer:
            layers += shard // pipeline
        elif entry.module_name == "word_embeddings":
            embedding += shard
        elif head:
            output += shard
    return layers + (embedding + output if pipeline == 1 else max(embedding, output))


def observe_bytes(plan: Plan, tensor: int, pipeline: int = 1) -> int:
    """Return the least memory that observe needs on a rank of the fullest stage.

    The sum of weights without the output layer, tower and projector, `working_bytes`, and the
    second moments of a single layer if a format needs them.
    """
    moments = 0.0
    if plan.second_moments:
        moments = _layer_moment_bytes(plan, tensor) / SECOND_MOMENT_MEMORY_FRACTION
    return int(_weight_bytes(plan, tensor, pipeline) + working_bytes(plan, tensor) + moments)


def working_bytes(plan: Plan, tensor: int) -> int:
    """Return the memory of a rank in observe beyond weights and second moments.

    The sum of the activations of one micro-batch inside a layer, the prefetched image features,
    and the second moments of a layer that are being written to a file.
    """
    decoder, batch = plan.decoder, plan.recipe.calibration.micro_batch
    query, tokens_per_image = decoder.heads * decoder.head_dim, plan.family.tokens_per_image
    image_tokens = tokens_per_image(plan.config) if tokens_per_image else MAX_IMAGE_TOKENS
    tokens = batch * (image_tokens + TEXT_TOKENS)
    sharded = (decoder.ffn + query) // tensor
    gathered = max(decoder.ffn, query) if tensor > 1 else 0
    activations = 6 * decoder.hidden + 3 * sharded + gathered
    image_features = PREFETCH_MICRO_BATCHES * decoder.hidden
    moments = _layer_moment_bytes(plan, 1) if plan.second_moments else 0
    return bytes_per_parameter(plan) * tokens * (activations + image_features) + moments


def observe_bytes_with_passes(plan: Plan, tensor: int, pipeline: int = 1, passes: int = 1) -> int:
    """Return the memory of a rank that sums its second moments in `passes` passes over the data."""
    layers = math.ceil(plan.decoder.layers / pipeline / passes)
    moments = layers * _layer_moment_bytes(plan, tensor)
    return _weight_bytes(plan, tensor, pipeline) + working_bytes(plan, tensor) + moments


def count_passes(plan: Plan, tensor: int, pipeline: int, gpu_memory: int) -> int:
    """Return how many passes over the data observe makes with `gpu_memory` bytes per rank."""
    if not plan.second_moments:
        return 1
    free = gpu_memory - _weight_bytes(plan, tensor, pipeline) - working_bytes(plan, tensor)
    limit = plan.recipe.calibration.max_statistics_memory or SECOND_MOMENT_MEMORY_FRACTION * free
    layers_per_pass = max(1, limit // _layer_moment_bytes(plan, tensor))
    return math.ceil(plan.decoder.layers / pipeline / layers_per_pass)


def _weight_bytes(plan: Plan, tensor: int, pipeline: int) -> int:
    """Return the bytes of a rank's decoder without output layer, of the tower and the projector."""
    decoder = rank_parameters(plan, tensor, pipeline, head=False)
    return bytes_per_parameter(plan) * (decoder + vision_parameters(plan))


def bytes_per_parameter(plan: Plan) -> int:
    """Return the bytes per parameter of weights that are not quantized."""
    return 4 if plan.dtype == "float32" else 2


def vision_parameters(plan: Plan) -> int:
    """Return the parameters of tower and projector, which are replicated over all ranks."""
    return sum(math.prod(plan.tensors[name].shape) for name in plan.vision_names)


def full_model_bytes(plan: Plan, parameter_bytes: int) -> int:
    """Return the bytes of the whole model on one device, at `parameter_bytes` per parameter."""
    return parameter_bytes * (rank_parameters(plan, 1) + vision_parameters(plan))


def linear_parameters(plan: Plan) -> int:
    """Return the number of parameters that the formats quantize."""
    linears = tuple(entry for entry in plan.family.parameter_map if entry.is_linear)
    return sum(math.prod(shape) for shape in plan.decoder.shapes(linears).values())


def _describe_tensor_sizes(plan: Plan) -> list[str]:
    """Return one line per supported tensor size: the memory of a rank without pipeline stages."""
    vision, width, lines = vision_parameters(plan), bytes_per_parameter(plan), []
    for tensor in calibration_tensor_sizes(plan):
        decoder = rank_parameters(plan, tensor)
        lines.append(
            f"           TP {tensor:<2} {decoder / 1e6:>9,.1f} M parameters per rank, "
            f"{decoder * width / 1e6:>9,.1f} MB; tower and projector {vision * width / 1e6:,.1f} "
            f"MB; observe {observe_bytes(plan, tensor) / 1e9:,.1f} GB"
        )
    return lines


def _layer_moment_bytes(plan: Plan, tensor: int) -> int:
    """Return the bytes of one layer's second moments while they are summed, on tensor rank 0."""
    decoder = plan.decoder
    widths = (decoder.hidden, decoder.heads * decoder.head_dim, decoder.hidden, decoder.ffn)
    return MODALITIES * FLOAT64_BYTES * sum(strip_numel(width, 0, tensor) for width in widths)


def _describe_second_moments(plan: Plan) -> str:
    """Return a line on the memory of all layers in one pass, and the size on disk."""
    parallel, layers = plan.recipe.parallel, plan.decoder.layers
    memory = layers // int(parallel.pipeline) * _layer_moment_bytes(plan, int(parallel.tensor))
    disk = layers * _layer_moment_bytes(plan, 1) / 2  # stored as float32
    return (
        f"           second moments: {memory / 1e6:,.1f} MB per rank in one pass, less in several; "
        f"{disk / 1e6:,.1f} MB on disk"
    )

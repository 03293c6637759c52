"""Sizes of a plan's weights, statistics and activations, from tensor shapes alone.

They are known before any rank is started, and count the large tensors only; what plans with them
leaves a margin for the rest.
"""

from __future__ import annotations

import math

from nemo_vlm_ptq.constants import BLOCK_FEATURES, SKETCH_ROWS, VOCAB_MULTIPLE
from nemo_vlm_ptq.distributed.moment_strips import strip_numel
from nemo_vlm_ptq.planning.plan import Plan

TEXT_TOKENS = 128  # per sample: prompt, a long question, a short answer
PREFETCH_MICRO_BATCHES = 8  # micro-batches whose images are encoded in advance
MODALITIES = 2  # text and image, with second moments of their own
FLOAT64_BYTES = 8  # per element of a second moment while it is summed


def used_tensor_names(plan: Plan) -> list[str]:
    """List the source tensors in use: decoder, vision tower and projector."""
    return [*plan.decoder.shapes(plan.parameter_map), *plan.vision_names]


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
    for entry in plan.parameter_map:
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


def layer_weight_bytes(plan: Plan, tensor: int) -> int:
    """Return the bytes of the largest layer's weights on a rank."""
    numel = [0] * plan.decoder.layers
    for entry in plan.parameter_map:
        layers = list(filter(entry.in_layer, range(plan.decoder.layers)))
        shapes = plan.decoder.shapes((entry,)).values()
        for layer in layers:
            full = sum(math.prod(shape) for shape in shapes) // len(layers)
            numel[layer] += full if entry.sharding == "replicate" else full // tensor
    return max(numel) * bytes_per_parameter(plan)


def resident_bytes(plan: Plan, tensor: int) -> int:
    """Return the bytes of what stands beside the first window: embedding, tower and projector."""
    decoder = plan.decoder
    embedding = decoder.sizes(VOCAB_MULTIPLE).padded_vocab * decoder.hidden // tensor
    return bytes_per_parameter(plan) * (embedding + vision_parameters(plan))


def sample_tokens(plan: Plan) -> int:
    """Return the tokens of a sample: those of an image, and of a prompt with its answer."""
    family, image = plan.family, plan.family.most_tokens_per_image
    if family.tokens_per_image is not None:
        image = family.tokens_per_image(plan.config)
    elif family.pixels_per_token is not None:
        image = plan.recipe.calibration.max_pixels // family.pixels_per_token(plan.config)
    return image + TEXT_TOKENS


def working_bytes(plan: Plan, tensor: int) -> int:
    """Return the memory of a rank in observe beyond weights, statistics and hidden states.

    The sum of the activations of one micro-batch inside a layer, the prefetched image features,
    and the statistics of a layer that is solved.
    """
    decoder, batch = plan.decoder, plan.recipe.calibration.micro_batch
    query = decoder.most_q_features
    tokens = batch * sample_tokens(plan)
    sharded = (decoder.ffn + query) // tensor
    gathered = max(decoder.ffn, query) if tensor > 1 else 0
    activations = 6 * decoder.hidden + 3 * sharded + gathered
    image_features = PREFETCH_MICRO_BATCHES * decoder.hidden
    solved = layer_statistics_bytes(plan, 1)
    return bytes_per_parameter(plan) * tokens * (activations + image_features) + solved


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
    linears = tuple(entry for entry in plan.parameter_map if entry.is_linear)
    return sum(math.prod(shape) for shape in plan.decoder.shapes(linears).values())


def layer_statistics_bytes(plan: Plan, tensor: int) -> int:
    """Return the bytes of one layer's statistics while they are summed, on the fullest tensor rank.

    Maxima and sums take little beside sketches and second moments.
    """
    decoder = plan.decoder
    widths = (decoder.hidden, decoder.most_q_features, decoder.hidden, decoder.ffn)
    numel = 0
    if "sketch" in plan.moments:  # a tensor rank has those of every `tensor`-th linear
        sizes = [width * (SKETCH_ROWS + math.gcd(width, BLOCK_FEATURES)) for width in widths]
        numel += max(sum(sizes[t::tensor]) for t in range(tensor))
    if "whole" in plan.moments:
        numel += sum(strip_numel(width, 0, tensor) for width in widths)
    return MODALITIES * FLOAT64_BYTES * numel

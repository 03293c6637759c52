"""Sharding against reference loops that place one head or one row at a time."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales, shard_scales
from nemo_vlm_ptq.families.decoder import Decoder
from nemo_vlm_ptq.parameter_map.sharding import HeadSizes, shard_input, shard_tensor, unshard_tensor

SIZES = HeadSizes(heads=8, kv_heads=4, head_dim=4, vocab=500, padded_vocab=512)
INPUT_FEATURES, GROUP_SIZE = 32, 4
TENSOR_SIZES = (1, 2, 4)
# sharding -> rows of the Hugging Face tensors that one Megatron parameter holds
PART_ROWS = {
    "replicate": (24,),
    "column": (24,),
    "row": (24,),
    "gated": (24, 24),
    "qkv": (32, 16, 16),
    "vocab": (500,),
}
LINEAR_SHARDING = {
    "linear_qkv": "qkv",
    "linear_proj": "row",
    "linear_fc1": "gated",
    "linear_fc2": "row",
}


def arange(*shape):
    """Return a tensor whose values are 0, 1, 2, ..."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def make_parts(sharding, columns=INPUT_FEATURES):
    """Return the HF tensors of a parameter; all values are distinct."""
    return [arange(rows, columns) + 1e5 * (i + 1) for i, rows in enumerate(PART_ROWS[sharding])]


def head_rows(part, head):
    return [part[head * SIZES.head_dim + row] for row in range(SIZES.head_dim)]


def reference_shard(sharding, parts, t, T):
    """Build shard t of T row by row, in Megatron-core's order."""
    rows = []
    if sharding == "qkv":
        kv_heads, queries = SIZES.kv_heads // T, SIZES.heads // SIZES.kv_heads
        for kv_head in range(t * kv_heads, (t + 1) * kv_heads):
            for query in range(queries):
                rows += head_rows(parts[0], kv_head * queries + query)
            rows += head_rows(parts[1], kv_head) + head_rows(parts[2], kv_head)
    elif sharding == "row":
        width = parts[0].shape[1] // T
        rows = [row[t * width : (t + 1) * width] for row in parts[0]]
    elif sharding == "vocab":
        height = SIZES.padded_vocab // T
        for token in range(t * height, (t + 1) * height):
            is_padding = token >= SIZES.vocab
            rows.append(torch.zeros(parts[0].shape[1]) if is_padding else parts[0][token])
    elif sharding == "replicate":
        rows = list(parts[0])
    else:
        for part in parts:
            height = len(part) // T
            rows += [part[t * height + row] for row in range(height)]
    return torch.stack(rows)


def concat_shards(sharding, shards):
    """Return Megatron's full parameter, as loaded from a checkpoint with TP 1."""
    if sharding == "replicate":
        return shards[0]
    if sharding == "row":
        return torch.cat(shards, dim=1)
    if sharding == "gated":  # each shard is [gate|up]
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[i] for i in (0, 1) for half in halves])
    return torch.cat(shards)


@pytest.mark.parametrize("T", TENSOR_SIZES)
@pytest.mark.parametrize("sharding", PART_ROWS)
def test_shards_match_reference_loops(sharding, T):
    parts = make_parts(sharding)
    for t in range(T):
        shard = shard_tensor(sharding, parts, SIZES, t, T)
        assert torch.equal(shard, reference_shard(sharding, parts, t, T))


@pytest.mark.parametrize("T", TENSOR_SIZES)
@pytest.mark.parametrize("sharding", PART_ROWS)
def test_unshard_inverts_shard(sharding, T):
    parts = make_parts(sharding)
    shards = [shard_tensor(sharding, parts, SIZES, t, T) for t in range(T)]
    unsharded = unshard_tensor(sharding, concat_shards(sharding, shards), SIZES)
    assert len(unsharded) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(unsharded, parts, strict=True))


@pytest.mark.parametrize("sharding", ["column", "gated", "qkv"])
@pytest.mark.parametrize("T", TENSOR_SIZES)
def test_per_channel_scales_are_sharded_like_weight_rows(sharding, T):
    parts = make_parts(sharding)
    scales = [part[:, 0].clone() for part in parts]  # the scale of a row is its first value
    for t in range(T):
        shard = shard_tensor(sharding, parts, SIZES, t, T)
        assert torch.equal(shard_tensor(sharding, scales, SIZES, t, T), shard[:, 0])
    whole = shard_tensor(sharding, scales, SIZES, 0, 1)
    unsharded = unshard_tensor(sharding, whole, SIZES)
    assert all(torch.equal(a, b) for a, b in zip(unsharded, scales, strict=True))


def test_per_channel_scales_of_row_parallel_weights_are_replicated():
    (part,) = make_parts("row")
    for t in range(2):
        assert torch.equal(shard_tensor("row", [part[:, 0]], SIZES, t, 2), part[:, 0])


@pytest.mark.parametrize("sharding", ["column", "row", "gated", "qkv"])
@pytest.mark.parametrize("T", TENSOR_SIZES)
def test_per_group_scales_are_sharded_like_their_groups(sharding, T):
    parts = make_parts(sharding)
    scales = [part[:, ::GROUP_SIZE].clone() for part in parts]
    for t in range(T):
        shard = shard_tensor(sharding, parts, SIZES, t, T)
        assert torch.equal(shard_tensor(sharding, scales, SIZES, t, T), shard[:, ::GROUP_SIZE])


@pytest.mark.parametrize("T", TENSOR_SIZES)
def test_per_input_channel_vectors_are_sharded_for_row_parallel_weights_only(T):
    vector = arange(INPUT_FEATURES)
    for t in range(T):
        (weight,) = make_parts("row")
        shard = shard_tensor("row", [weight], SIZES, t, T)
        assert torch.equal(shard_input("row", vector, t, T), shard[0] - 1e5)
        assert torch.equal(shard_input("column", vector, t, T), vector)


@pytest.mark.parametrize("T", TENSOR_SIZES)
@pytest.mark.parametrize("linear", LINEAR_SHARDING)
def test_solved_scales_are_sharded_like_their_weight(linear, T):
    sharding = LINEAR_SHARDING[linear]
    parts = make_parts(sharding)
    whole, scale = shard_tensor(sharding, parts, SIZES, 0, 1), arange(INPUT_FEATURES)
    for t in range(T):
        shard = shard_tensor(sharding, parts, SIZES, t, T)
        per_tensor = LinearScales(weight_amax=whole.amax(), pre_quant_scale=scale)
        found = shard_scales(per_tensor, linear, t, T)
        assert torch.equal(found.weight_amax, whole.amax()), "per-tensor amax covers all shards"
        width = INPUT_FEATURES // T if sharding == "row" else INPUT_FEATURES
        start = t * width if sharding == "row" else 0
        assert torch.equal(found.pre_quant_scale, scale[start : start + width])
        per_channel = shard_scales(LinearScales(weight_amax=whole[:, 0]), linear, t, T)
        expected = whole[:, 0] if sharding == "row" else shard[:, 0]
        assert torch.equal(per_channel.weight_amax, expected)
        per_group = shard_scales(LinearScales(weight_amax=whole[:, ::GROUP_SIZE]), linear, t, T)
        assert torch.equal(per_group.weight_amax, shard[:, ::GROUP_SIZE])


@pytest.mark.parametrize("sharding", PART_ROWS)
def test_safetensors_slices_are_sharded_like_tensors(sharding, tmp_path):
    parts = make_parts(sharding)
    save_file({str(i): part for i, part in enumerate(parts)}, tmp_path / "parts")
    with safe_open(tmp_path / "parts", framework="pt") as file:
        slices = [file.get_slice(str(i)) for i in range(len(parts))]
        for t in range(4):
            expected = shard_tensor(sharding, parts, SIZES, t, 4)
            assert torch.equal(shard_tensor(sharding, slices, SIZES, t, 4), expected)


def test_shards_beyond_the_vocabulary_are_padding():
    sizes = HeadSizes(heads=8, kv_heads=4, head_dim=4, vocab=100, padded_vocab=256)
    source = arange(100, 8) + 1
    shards = [shard_tensor("vocab", [source], sizes, t, 4) for t in range(4)]
    assert [int(shard.any(dim=1).sum()) for shard in shards] == [64, 36, 0, 0]
    assert all(shard.shape == (64, 8) for shard in shards)
    assert torch.equal(unshard_tensor("vocab", torch.cat(shards), sizes)[0], source)


@pytest.mark.parametrize(("vocab", "padded"), [(500, 512), (512, 512), (513, 576), (32064, 32064)])
def test_vocabulary_is_padded_to_a_multiple_of_64(vocab, padded):
    decoder = Decoder(
        hidden=256,
        ffn=512,
        layers=4,
        heads=8,
        kv_heads=4,
        head_dim=32,
        vocab=vocab,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_positions=256,
    )
    assert decoder.sizes(64).padded_vocab == padded
    assert decoder.sizes(1).padded_vocab == vocab

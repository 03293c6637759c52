"""Layouts: what a rank holds, against loops that place one head or one row at a time."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_vlm_ptq.parameter_map.sharding import HeadSizes, shard_input, shard_tensor, unshard_tensor

SIZES = HeadSizes(heads=8, kv_heads=4, head_dim=4, vocab=500, padded_vocab=512)
INPUTS, GROUP = 32, 4
RANKS = (1, 2, 4)
# layout -> rows of the Hugging Face tensors that one Megatron tensor is made of
PARTS = {
    "replicate": (24,),
    "column": (24,),
    "row": (24,),
    "gated": (24, 24),
    "qkv": (32, 16, 16),
    "vocab": (500,),
}


def numbered(*shape):
    """A tensor whose every value is its own position."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def make_parts(kind, columns=INPUTS):
    """The HF tensors of a row; no value comes twice."""
    return [numbered(rows, columns) + 1e5 * (i + 1) for i, rows in enumerate(PARTS[kind])]


def head(part, index):
    return [part[index * SIZES.head_dim + row] for row in range(SIZES.head_dim)]


def by_hand(kind, parts, t, T):
    """Shard t of T, row by row, as Megatron-core stores it."""
    rows = []
    if kind == "qkv":
        per_rank, share = SIZES.kv_heads // T, SIZES.heads // SIZES.kv_heads
        for kv in range(t * per_rank, (t + 1) * per_rank):
            for query in range(share):
                rows += head(parts[0], kv * share + query)
            rows += head(parts[1], kv) + head(parts[2], kv)
    elif kind == "row":
        width = parts[0].shape[1] // T
        rows = [row[t * width : (t + 1) * width] for row in parts[0]]
    elif kind == "vocab":
        height = SIZES.padded_vocab // T
        for token in range(t * height, (t + 1) * height):
            known = token < SIZES.vocab
            rows.append(parts[0][token] if known else torch.zeros(parts[0].shape[1]))
    elif kind == "replicate":
        rows = list(parts[0])
    else:
        for part in parts:
            height = len(part) // T
            rows += [part[t * height + row] for row in range(height)]
    return torch.stack(rows)


def join(kind, shards):
    """Megatron's whole tensor from its shards, as a checkpoint loaded on one rank holds it."""
    if kind == "replicate":
        return shards[0]
    if kind == "row":
        return torch.cat(shards, dim=1)
    if kind == "gated":  # a shard holds gate, then up
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[i] for i in (0, 1) for half in halves])
    return torch.cat(shards)


@pytest.mark.parametrize("T", RANKS)
@pytest.mark.parametrize("kind", PARTS)
def test_a_shard_is_what_placing_rows_by_hand_gives(kind, T):
    parts = make_parts(kind)
    for t in range(T):
        assert torch.equal(shard_tensor(kind, parts, SIZES, t, T), by_hand(kind, parts, t, T))


@pytest.mark.parametrize("T", RANKS)
@pytest.mark.parametrize("kind", PARTS)
def test_shards_put_together_give_the_source_back(kind, T):
    parts = make_parts(kind)
    whole = join(kind, [shard_tensor(kind, parts, SIZES, t, T) for t in range(T)])
    back = unshard_tensor(kind, whole, SIZES)
    assert len(back) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))


@pytest.mark.parametrize("kind", ["column", "gated", "qkv"])
@pytest.mark.parametrize("T", RANKS)
def test_a_scale_per_output_channel_goes_where_its_row_goes(kind, T):
    parts = make_parts(kind)
    scales = [part[:, 0].clone() for part in parts]  # the scale of a row is its first value
    for t in range(T):
        shard = shard_tensor(kind, parts, SIZES, t, T)
        assert torch.equal(shard_tensor(kind, scales, SIZES, t, T), shard[:, 0])
    whole = shard_tensor(kind, scales, SIZES, 0, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(unshard_tensor(kind, whole, SIZES), scales, strict=True)
    )


def test_a_scale_per_output_channel_of_a_row_parallel_weight_is_whole_on_every_rank():
    (part,) = make_parts("row")
    for t in range(2):
        assert torch.equal(shard_tensor("row", [part[:, 0]], SIZES, t, 2), part[:, 0])


@pytest.mark.parametrize("kind", ["column", "row", "gated", "qkv"])
@pytest.mark.parametrize("T", RANKS)
def test_a_scale_per_group_goes_where_its_inputs_go(kind, T):
    parts = make_parts(kind)
    scales = [part[:, ::GROUP].clone() for part in parts]
    for t in range(T):
        shard = shard_tensor(kind, parts, SIZES, t, T)
        assert torch.equal(shard_tensor(kind, scales, SIZES, t, T), shard[:, ::GROUP])


@pytest.mark.parametrize("T", RANKS)
def test_a_scale_per_input_channel_is_cut_for_row_parallel_weights_alone(T):
    vector = numbered(INPUTS)
    for t in range(T):
        (weight,) = make_parts("row")
        shard = shard_tensor("row", [weight], SIZES, t, T)
        assert torch.equal(shard_input("row", vector, t, T), shard[0] - 1e5)
        assert torch.equal(shard_input("column", vector, t, T), vector)


LINEARS = {
    "linear_qkv": "qkv",
    "linear_proj": "row",
    "linear_fc1": "gated",
    "linear_fc2": "row",
}


@pytest.mark.parametrize("T", RANKS)
@pytest.mark.parametrize("linear", LINEARS)
def test_solved_scales_are_cut_like_their_weight(linear, T):
    from nemo_vlm_ptq.calibrate.solve.scales import LinearScales, shard_scales

    kind = LINEARS[linear]
    parts = make_parts(kind)
    whole, pre_quant_scale = shard_tensor(kind, parts, SIZES, 0, 1), numbered(INPUTS)
    for t in range(T):
        shard = shard_tensor(kind, parts, SIZES, t, T)
        one = shard_scales(
            LinearScales(whole.amax(), pre_quant_scale=pre_quant_scale), linear, t, T
        )
        assert torch.equal(one.weight_amax, whole.amax()), "one a tensor: that of all shards"
        width = INPUTS // T if kind == "row" else INPUTS
        start = t * width if kind == "row" else 0
        assert torch.equal(one.pre_quant_scale, pre_quant_scale[start : start + width])
        channel = shard_scales(LinearScales(whole[:, 0]), linear, t, T).weight_amax
        expected = whole[:, 0] if kind == "row" else shard[:, 0]
        assert torch.equal(channel, expected)
        group = shard_scales(LinearScales(whole[:, ::GROUP]), linear, t, T).weight_amax
        assert torch.equal(group, shard[:, ::GROUP])


@pytest.mark.parametrize("kind", PARTS)
def test_a_file_is_cut_like_a_tensor(kind, tmp_path):
    parts = make_parts(kind)
    save_file({str(i): part for i, part in enumerate(parts)}, tmp_path / "parts")
    with safe_open(tmp_path / "parts", framework="pt") as file:
        slices = [file.get_slice(str(i)) for i in range(len(parts))]
        for t in range(4):
            assert torch.equal(
                shard_tensor(kind, slices, SIZES, t, 4), shard_tensor(kind, parts, SIZES, t, 4)
            )


def test_a_vocabulary_much_smaller_than_its_rows_leaves_whole_shards_empty():
    sizes = HeadSizes(heads=8, kv_heads=4, head_dim=4, vocab=100, padded_vocab=256)
    source = numbered(100, 8) + 1
    shards = [shard_tensor("vocab", [source], sizes, t, 4) for t in range(4)]
    assert [int(shard.any(dim=1).sum()) for shard in shards] == [64, 36, 0, 0]
    assert all(shard.shape == (64, 8) for shard in shards)
    assert torch.equal(unshard_tensor("vocab", torch.cat(shards), sizes)[0], source)


@pytest.mark.parametrize(("vocab", "rows"), [(500, 512), (512, 512), (513, 576), (32064, 32064)])
def test_the_vocabulary_is_padded_to_the_next_multiple_of_64(vocab, rows):
    from nemo_vlm_ptq.families.base import Decoder

    decoder = Decoder(256, 512, 4, 8, 4, 32, vocab, 1e-5, 1e4, 256)
    assert decoder.sizes(64).padded_vocab == rows
    assert decoder.sizes(1).padded_vocab == vocab

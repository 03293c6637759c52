"""Random encoded models for the targets' writers, and reference decoding of their codes.

Codes are decoded here from tables, independently of the package.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from nemo_vlm_ptq.calibrate.solve.layer import weight_names
from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.decoder import Decoder, LongRope
from nemo_vlm_ptq.formats import KV_CACHES
from nemo_vlm_ptq.numerics import weight_amax
from nemo_vlm_ptq.parameter_map.entries import expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.targets.hf import config as hf_config
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.hf import tensors as hf
from nemo_vlm_ptq.targets.trtllm import tensors as trtllm
from nemo_vlm_ptq.targets.trtllm.config import checkpoint_config
from nemo_vlm_ptq.targets.writing.encode import EncodedLinear, encode_ends, encode_layer, kv_scales
from nemo_vlm_ptq.targets.writing.published import PublishedFormat, entry_tensors
from nemo_vlm_ptq.workdir.store import save_tensors

LONG_ROPE = LongRope(
    short_factors=(1.0,) * 16,
    long_factors=(2.0,) * 16,
    original_max_positions=128,
    attention_factor=1.1,
)
DECODER = Decoder(
    hidden=256,
    ffn=512,
    layers=2,
    heads=8,
    kv_heads=4,
    head_dim=32,
    vocab=500,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=256,
)
DECODERS = {"llava": DECODER, "phi": replace(DECODER, long_rope=LONG_ROPE)}
GROUP_SIZE = 32
DTYPE = torch.bfloat16
E2M1_MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
KV_AMAX = ((3.0, 5.0), (7.0, 2.0))  # (keys, values) of each layer
HF_FORMAT = PublishedFormat(
    linear_tensors=hf.linear_tensors, kv_tensors=hf.kv_tensors, describe=lambda *_: {}
)


@dataclass(frozen=True)
class EncodedModel:
    """A random model encoded in one format.

    layers: unsharded layers.
    ends: shard (t, T) -> embedding, final norm and head.
    layer: (index, shard) -> a layer.
    """

    family: str
    fmt: object
    layers: list
    ends: Callable
    decoder: Decoder
    group_size: int
    layer: Callable


def random_weight(family, entry, decoder):
    """Return Megatron's unsharded tensor of an entry, with a padded vocabulary."""
    shapes = [decoder.shapes(family.parameter_map(decoder))[name] for name in entry.hf_names]
    parts = [torch.randn(shape, dtype=DTYPE) for shape in shapes]
    return shard_tensor(entry.sharding, parts, decoder.sizes(64), 0, 1)


def random_scales(weight, fmt, group_size):
    """Return scales with the weight's own amax, and random values for the rest."""
    second_amax = input_amax = pre_quant_scale = a_RK = b_OR = None
    if fmt.second_weight is not None:
        second_amax = weight.float().abs().amax()
    if fmt.activation not in (None, "fp8_token"):
        input_amax = torch.rand(()) + 0.1
    if fmt.uses_pre_quant_scale:
        pre_quant_scale = (torch.rand(weight.shape[1]) + 0.5).to(DTYPE).float()
    if fmt.low_rank:
        a_RK = torch.randn(fmt.low_rank, weight.shape[1], dtype=DTYPE)
        b_OR = torch.randn(weight.shape[0], fmt.low_rank, dtype=DTYPE)
    return LinearScales(
        weight_amax=weight_amax(weight, fmt.granularity, fmt.group(group_size)),
        weight_amax_2=second_amax,
        input_amax=input_amax,
        pre_quant_scale=pre_quant_scale,
        low_rank_a=a_RK,
        low_rank_b=b_OR,
    )


def random_model(fmt, family_name="llava", decoder=None, group_size=GROUP_SIZE):
    """Return a random encoded model; fmt None leaves it in 16 bit."""
    torch.manual_seed(0)
    family, decoder = FAMILIES[family_name], decoder or DECODERS[family_name]
    rows = family.parameter_map(decoder)
    entries = expand_layers(rows, range(decoder.layers))
    weights = {entry.megatron_name: random_weight(family, entry, decoder) for entry in entries}
    scales = {
        entry.megatron_name: random_scales(weights[entry.megatron_name], fmt, group_size)
        for entry in entries
        if entry.is_linear and fmt is not None
    }

    def read(names):
        return {name: weights[name] for name in names}

    def layer(index, shard=(0, 1)):
        layer_scales = {linear: scales.get(name) for linear, name in weight_names(index).items()}
        return encode_layer(rows, index, read, layer_scales, fmt, decoder, shard=shard)

    return EncodedModel(
        family=family_name,
        fmt=fmt,
        layers=[layer(index) for index in range(decoder.layers)],
        ends=partial(encode_ends, rows, read, decoder),
        decoder=decoder,
        group_size=group_size,
        layer=layer,
    )


def encoded_entries(model):
    """Return all encoded entries of a model, unsharded."""
    return [entry for part in (*model.layers, model.ends((0, 1))) for entry in part.values()]


def concatenate(parts):
    """Concatenate encoded parts along output features, row by row."""
    first = parts[0]
    fields = {}
    for key in ("codes", "scale", "low_rank_b"):
        tensors = [getattr(part, key) for part in parts]
        if tensors[0] is not None and tensors[0].dim():
            rows = [list(tensor.unbind()) for tensor in tensors]
            fields[key] = torch.stack(list(itertools.chain(*rows)))
    return replace(first, **fields)


def by_hf_name(model):
    """Return EncodedLinear or tensor by Hugging Face name; fused parts are concatenated."""
    named = {}
    for encoded in encoded_entries(model):
        parts, names = list(encoded.parts), encoded.entry.hf_names
        if len(parts) > len(names):
            plain = isinstance(parts[0], torch.Tensor)
            parts = [torch.cat(parts) if plain else concatenate(parts)]
        named |= dict(zip(names, parts, strict=True))
    return named


def decoded_weight(linear: EncodedLinear):
    """Return the weight [O,K] float32 that the codes stand for."""
    codes, scale = linear.codes, linear.scale.float()
    if linear.number_format == "nvfp4":
        values = E2M1_MAGNITUDES[codes.int() % 8] * (1 - 2 * (codes.int() // 8))
        scale = scale * linear.scale_2
    elif linear.number_format == "nf4":
        values = torch.tensor(nf4.NF4_VALUES)[codes.int()]
    else:
        values = codes.float()
    if scale.dim() == 2:
        scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    weight = values * (scale[:, None] if scale.dim() == 1 else scale)
    if linear.number_format == "nf4":
        return weight.to(DTYPE).float()
    if linear.number_format == "int4" and linear.scale_2 is not None:
        weight = (weight / linear.scale_2).to(torch.float8_e4m3fn).float() * linear.scale_2
    return weight


def kv_cache_scales(name):
    """Return the KV cache format or None, and its scales of each layer."""
    kv = KV_CACHES.get(name)
    if kv is None:
        return None, []
    return kv, [kv_scales(*map(torch.tensor, pair), kv) for pair in KV_AMAX]


def write_trtllm(folder, model, layout=(1, 1), kv_cache="none"):
    """Write rank files and config.json for a serving layout (tensor, pipeline)."""
    decoder, architecture = model.decoder, FAMILIES[model.family].trtllm_architecture
    kv, scales = kv_cache_scales(kv_cache)
    T, P = layout
    folder.mkdir()
    for p, t in itertools.product(range(P), range(T)):
        tensors = trtllm.end_tensors(model.ends((t, T)), architecture, (p, P), DTYPE)
        for local, index in enumerate(trtllm.layers_of(decoder, p, P)):
            layer = trtllm.layer_tensors(model.layer(index, (t, T)), architecture, DTYPE)
            layer |= trtllm.kv_tensors(scales[index]) if scales else {}
            prefix = f"transformer.layers.{local}."
            tensors |= {prefix + name: tensor for name, tensor in layer.items()}
        save_tensors(tensors, folder / f"rank{p * T + t}.safetensors")
    config = checkpoint_config(
        architecture, decoder, model.fmt, model.group_size, "bfloat16", layout, kv
    )
    (folder / "config.json").write_text(json.dumps(config))


def write_hf(folder, model, kv_cache="none"):
    """Write a unified Hugging Face checkpoint: one file of weights, and the config files."""
    folder.mkdir()
    kv, scales = kv_cache_scales(kv_cache)
    tensors = {}
    for encoded in encoded_entries(model):
        tensors |= entry_tensors(encoded, DTYPE, HF_FORMAT)
    for layer, layer_scales in zip(model.layers, scales, strict=False):
        tensors |= hf.kv_tensors(layer["linear_qkv"], layer_scales)
    save_tensors(tensors, folder / "model.safetensors")
    if model.fmt.weight == "nf4":
        files = {"config.json": {"quantization_config": nf4.quantization_config("bfloat16", [])}}
    else:
        block = hf_config.quantization_block(model.fmt, GROUP_SIZE, [], kv)
        files = hf_config.config_files({}, block)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))

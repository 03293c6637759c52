"""Random models as the exporters are given them, and what their codes stand for.

Values are worked out here from tables, by nobody's code but this.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from nemo_vlm_ptq.calibrate.solve.layer import weight_names
from nemo_vlm_ptq.calibrate.solve.scales import LinearScales
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.base import Decoder, LongRope
from nemo_vlm_ptq.formats import KV_CACHES
from nemo_vlm_ptq.numerics import weight_amax
from nemo_vlm_ptq.parameter_map.entries import expand_layers
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.targets.hf import tensors as hf
from nemo_vlm_ptq.targets.trtllm import tensors as trtllm
from nemo_vlm_ptq.targets.writing.encode import EncodedLinear, encode_ends, encode_layer, kv_scales
from nemo_vlm_ptq.workdir.store import save_tensors

ROPE = LongRope((1.0,) * 16, (2.0,) * 16, 128, 1.1)
DECODER = Decoder(256, 512, 2, 8, 4, 32, 500, 1e-5, 1e4, 256)
DECODERS = {"llava": DECODER, "phi": replace(DECODER, long_rope=ROPE)}
GROUP = 32
DTYPE = torch.bfloat16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
KV_AMAX = ((3.0, 5.0), (7.0, 2.0))  # largest key and value of each layer


@dataclass(frozen=True)
class Stream:
    """A random model in one format, packed."""

    family: str
    fmt: object
    layers: list
    ends: Callable  # shard -> the ends as one rank serves them
    decoder: Decoder
    group: int
    layer: Callable  # (index, shard) -> a layer as one rank serves it


def random_weight(family, row, decoder):
    """Megatron's whole tensor of a row, its vocabulary padded."""
    shapes = [decoder.shapes(family.parameter_map)[name] for name in row.hf_names]
    parts = [torch.randn(shape, dtype=DTYPE) for shape in shapes]
    return shard_tensor(row.sharding, parts, decoder.sizes(64), 0, 1)


def random_scales(weight, fmt, group):
    """Scales of a linear with plain maxima for its weight, and anything for the rest."""
    rank = fmt.low_rank
    return LinearScales(
        weight_amax(weight, fmt.granularity, fmt.group(group)),
        None if fmt.second_weight is None else weight.float().abs().amax(),
        None if fmt.activation in (None, "fp8_token") else torch.rand(()) + 0.1,
        (torch.rand(weight.shape[1]) + 0.5).to(DTYPE).float() if fmt.pre_quant_scale else None,
        torch.randn(rank, weight.shape[1], dtype=DTYPE) if rank else None,
        torch.randn(weight.shape[0], rank, dtype=DTYPE) if rank else None,
    )


def random_stream(fmt, name="llava", decoder=None, group=GROUP):
    """A random model, taken apart; fmt None leaves it in 16 bit."""
    torch.manual_seed(0)
    family, decoder = FAMILIES[name], decoder or DECODERS[name]
    rows = expand_layers(family.parameter_map, range(decoder.layers))
    whole = {row.megatron_name: random_weight(family, row, decoder) for row in rows}
    scales = {
        row.megatron_name: random_scales(whole[row.megatron_name], fmt, group)
        for row in rows
        if row.is_linear and fmt is not None
    }

    def read(names):
        return {name: whole[name] for name in names}

    def layer(index, shard=(0, 1)):
        own = {linear: scales.get(key) for linear, key in weight_names(index).items()}
        return encode_layer(family.parameter_map, index, read, own, fmt, decoder, shard=shard)

    layers = [layer(index) for index in range(decoder.layers)]
    ends = partial(encode_ends, family.parameter_map, read, decoder)
    return Stream(name, fmt, layers, ends, decoder, group, layer)


def pieces(stream):
    """Every piece of a stream."""
    return [piece for part in (*stream.layers, stream.ends((0, 1))) for piece in part.values()]


def stacked(parts):
    """Packed parts above each other, byte by byte."""
    first = parts[0]
    fields = {}
    for key in ("codes", "scale", "low_rank_b"):
        tensors = [getattr(part, key) for part in parts]
        if tensors[0] is not None and tensors[0].dim():
            rows = [list(tensor.unbind()) for tensor in tensors]
            fields[key] = torch.stack(list(itertools.chain(*rows)))
    return replace(first, **fields)


def by_name(stream):
    """Hugging Face name -> Packed or tensor; parts that share a name above each other."""
    found = {}
    for piece in pieces(stream):
        parts = list(piece.parts)
        if len(parts) > len(piece.row.hf_names):
            plain = isinstance(parts[0], torch.Tensor)
            parts = [torch.cat(parts) if plain else stacked(parts)]
        found |= dict(zip(piece.row.hf_names, parts, strict=True))
    return found


def values(packed: EncodedLinear):
    """What the codes stand for, float32 [O,K]."""
    codes, scale = packed.codes, packed.scale.float()
    if packed.kind == "nvfp4":
        numbers = E2M1[codes.int() % 8] * (1 - 2 * (codes.int() // 8))
        scale = scale * packed.scale_2
    elif packed.kind == "nf4":
        numbers = torch.tensor(nf4.NF4)[codes.int()]
    else:
        numbers = codes.float()
    if scale.dim() == 2:
        scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    found = numbers * (scale[:, None] if scale.dim() == 1 else scale)
    if packed.kind == "nf4":
        return found.to(DTYPE).float()
    if packed.kind == "int4" and packed.scale_2 is not None:
        found = (found / packed.scale_2).to(torch.float8_e4m3fn).float() * packed.scale_2
    return found


def random_kv(name):
    """(row of a KV cache or None, its scales of each layer)."""
    kv = KV_CACHES.get(name)
    if kv is None:
        return None, []
    return kv, [kv_scales(*map(torch.tensor, pair), kv) for pair in KV_AMAX]


def write_trtllm(folder, stream, cut=(1, 1), kv="none"):
    """rank files and config.json of one cut, tensor x pipeline."""
    decoder, architecture = stream.decoder, FAMILIES[stream.family].trtllm_architecture
    row, scales = random_kv(kv)
    T, P = cut
    folder.mkdir()
    for p, t in itertools.product(range(P), range(T)):
        tensors = trtllm.end_tensors(stream.ends((t, T)), architecture, (p, P), DTYPE)
        for local, index in enumerate(trtllm.layers_of(decoder, p, P)):
            own = trtllm.layer_tensors(stream.layer(index, (t, T)), architecture, DTYPE)
            own |= trtllm.kv_tensors(scales[index]) if scales else {}
            tensors |= {f"transformer.layers.{local}.{name}": one for name, one in own.items()}
        save_tensors(tensors, folder / f"rank{p * T + t}.safetensors")
    config = trtllm.config(architecture, decoder, stream.fmt, stream.group, "bfloat16", cut, row)
    (folder / "config.json").write_text(json.dumps(config))


def hf_tensors(stream, kv="none"):
    """Published name -> tensor of a Hugging Face checkpoint."""
    tensors = {}
    for piece in pieces(stream):
        tensors |= hf.published_tensors(piece, DTYPE)
    for layer, scales in zip(stream.layers, random_kv(kv)[1], strict=False):
        tensors |= hf.kv_tensors(layer["linear_qkv"], scales)
    return tensors


def write_hf(folder, stream, kv="none"):
    """One file of weights and the two config files."""
    folder.mkdir()
    save_tensors(hf_tensors(stream, kv), folder / "model.safetensors")
    if stream.fmt.weight == "nf4":
        files = {"config.json": {"quantization_config": nf4.quantization_config("bfloat16", [])}}
    else:
        block = hf.quantization_block(stream.fmt, GROUP, [], random_kv(kv)[0])
        files = hf.config_files({}, block)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))

"""Small decoders with random weights and scales, quantized in any format on any ranks."""

import torch

from nemo_vlm_ptq.calibrate.solve.scales import LinearScales, shard_scales
from nemo_vlm_ptq.calibrate.statistics import LINEARS
from nemo_vlm_ptq.families.base import Decoder
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.numerics import weight_amax
from nemo_vlm_ptq.targets.megatron import quantizers

DECODER = Decoder(256, 512, 2, 8, 4, 32, 500, 1e-5, 1e4, 256)
SHAPES = {
    "linear_qkv": (512, 256),
    "linear_proj": (256, 256),
    "linear_fc1": (1024, 256),
    "linear_fc2": (256, 512),
}
GROUP, VOCAB = 64, 512
INPUT_TOP, KEY_TOP, VALUE_TOP = 3.0, 2.5, 1.75
IDS = torch.arange(40)[None]
CASES = [*((name, "none") for name in FORMATS), *(("nf4", kv) for kv in KV_CACHES)]
CASES += [("nvfp4_svdquant", kv) for kv in KV_CACHES]


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_weight(layer, linear):
    seed = 10 * layer + list(LINEARS).index(linear)
    return random(*SHAPES[linear], seed=seed) * 0.06


def cut(weight, linear, t, T):
    """Shard t of T of a linear's weight."""
    if linear in ("linear_proj", "linear_fc2"):
        return weight.chunk(T, dim=1)[t]
    if linear == "linear_fc1":
        return torch.cat([half.chunk(T)[t] for half in weight.chunk(2)])
    return weight.chunk(T)[t]


def rounded_part(weight, pre_quant_scale, a, b):
    """The weight that is rounded."""
    if pre_quant_scale is not None:
        weight = (weight.float() * (1 / pre_quant_scale.float())).to(weight.dtype)
    if a is not None:
        weight = (weight.double() - b.double() @ a.double()).to(weight.dtype)
    return weight


def whole_scales(name, layer, linear, dtype):
    """Random scales of a format for a whole linear, with the maxima that go with them."""
    row, (outputs, inputs) = FORMATS[name], SHAPES[linear]
    seed = 100 + 10 * layer + list(LINEARS).index(linear)
    pre_quant_scale = a = b = None
    if row.pre_quant_scale:
        pre_quant_scale = (1.5 + random(inputs, seed=seed).clamp(-1, 1)).to(dtype)
    if row.low_rank:
        a = (random(row.low_rank, inputs, seed=seed + 1) / 16).to(dtype)
        b = (random(outputs, row.low_rank, seed=seed + 2) / 16).to(dtype)
    rest = rounded_part(whole_weight(layer, linear).to(dtype), pre_quant_scale, a, b)
    return LinearScales(
        weight_amax(rest, row.granularity, row.group(GROUP)).to(dtype).float(),
        rest.float().abs().amax() if row.second_weight else None,
        torch.tensor(INPUT_TOP) if row.activation in ("fp8", "int8", "nvfp4") else None,
        None if pre_quant_scale is None else pre_quant_scale.float(),
        a,
        b,
    )


def kv_of(layer):
    return torch.tensor(KEY_TOP), torch.tensor([VALUE_TOP])


def scales_of(name, parallel, dtype):
    def cut_to_own(layer, linear):
        whole = whole_scales(name, layer, linear, dtype)
        return shard_scales(whole, linear, parallel.tensor, parallel.layout.tensor)

    return cut_to_own


def plain_model(parallel, dtype):
    """The decoder with random weights, the same on every layout."""
    model = build_decoder(DECODER, parallel, dtype)
    t, T = parallel.tensor, parallel.layout.tensor
    for parameter in model.parameters():
        parameter.fill_(1.0)
    for layer, linear, module in quantizers._linears(model):
        module.weight.copy_(cut(whole_weight(layer, linear), linear, t, T))
    for seed, module in enumerate((model.embedding.word_embeddings, model.output_layer)):
        module.weight.copy_((random(VOCAB, 256, seed=77 + seed) * 0.06).chunk(T)[t])
    return model


def inserted(parallel, name, kv, dtype):
    """A model without weights, with quantizers."""
    model = build_decoder(DECODER, parallel, dtype)
    quantizers.insert_quantizers(model, FORMATS[name], GROUP, KV_CACHES.get(kv))
    return model


def fill(model, parallel, name, kv, dtype):
    given = scales_of(name, parallel, dtype)
    quantizers.fill_quantizers(model, FORMATS[name], given, None if kv == "none" else kv_of)


def quantized(parallel, name, kv, dtype):
    """The model as solve leaves it."""
    row, model = FORMATS[name], plain_model(parallel, dtype)
    quantizers.insert_quantizers(model, row, GROUP, KV_CACHES.get(kv))
    layers = range(DECODER.layers)
    quantizers.prepare_weights(model, row, scales_of(name, parallel, dtype), layers)
    fill(model, parallel, name, kv, dtype)
    return model


def ask(model):
    return model(IDS, IDS, None)[0, :, : DECODER.vocab].float()

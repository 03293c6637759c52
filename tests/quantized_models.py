"""Small decoders with random weights and scales, quantized in any format and layout."""

import torch
from encoded_models import DECODER

from nemo_vlm_ptq.calibrate.solve.linear_scales import LinearScales, shard_scales
from nemo_vlm_ptq.calibrate.statistics import LINEARS
from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.numerics import weight_amax
from nemo_vlm_ptq.targets.megatron import quantizers

SHAPES = {
    "linear_qkv": (512, 256),
    "linear_proj": (256, 256),
    "linear_fc1": (1024, 256),
    "linear_fc2": (256, 512),
}
GROUP_SIZE, PADDED_VOCAB = 64, 512
INPUT_AMAX, KEY_AMAX, VALUE_AMAX = 3.0, 2.5, 1.75
INPUT_IDS = torch.arange(40)[None]
CASES = [*((name, "none") for name in FORMATS), *(("nf4", kv_cache) for kv_cache in KV_CACHES)]
CASES += [("nvfp4_svdquant", kv_cache) for kv_cache in KV_CACHES]


def random_tensor(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_weight(layer, linear):
    """Return the unsharded weight [O,K] of a linear, float32."""
    seed = 10 * layer + list(LINEARS).index(linear)
    return random_tensor(*SHAPES[linear], seed=seed) * 0.06


def shard_weight(weight, linear, t, T):
    """Return shard t of T of a linear's weight."""
    if linear in ("linear_proj", "linear_fc2"):
        return weight.chunk(T, dim=1)[t]
    if linear == "linear_fc1":
        return torch.cat([half.chunk(T)[t] for half in weight.chunk(2)])
    return weight.chunk(T)[t]


def residual_weight(weight, pre_quant_scale, low_rank_a, low_rank_b):
    """Return the weight that is rounded: divided by pre_quant_scale, minus the low-rank branch."""
    if pre_quant_scale is not None:
        weight = (weight.float() * (1 / pre_quant_scale.float())).to(weight.dtype)
    if low_rank_a is not None:
        weight = (weight.double() - low_rank_b.double() @ low_rank_a.double()).to(weight.dtype)
    return weight


def whole_scales(name, layer, linear, dtype):
    """Return random scales of an unsharded linear in a format, with the amaxes that follow."""
    fmt, (outputs, inputs) = FORMATS[name], SHAPES[linear]
    seed = 100 + 10 * layer + list(LINEARS).index(linear)
    pre_quant_scale = a = b = None
    if fmt.uses_pre_quant_scale:
        pre_quant_scale = (1.5 + random_tensor(inputs, seed=seed).clamp(-1, 1)).to(dtype)
    if fmt.low_rank:
        a = (random_tensor(fmt.low_rank, inputs, seed=seed + 1) / 16).to(dtype)
        b = (random_tensor(outputs, fmt.low_rank, seed=seed + 2) / 16).to(dtype)
    residual = residual_weight(whole_weight(layer, linear).to(dtype), pre_quant_scale, a, b)
    is_static = fmt.activation in ("fp8", "int8", "nvfp4")
    amax = weight_amax(residual, fmt.granularity, fmt.group(GROUP_SIZE))
    return LinearScales(
        weight_amax=amax.to(dtype).float(),
        weight_amax_2=residual.float().abs().amax() if fmt.second_weight else None,
        input_amax=torch.tensor(INPUT_AMAX) if is_static else None,
        pre_quant_scale=None if pre_quant_scale is None else pre_quant_scale.float(),
        low_rank_a=a,
        low_rank_b=b,
    )


def get_kv_amax(layer):
    return torch.tensor(KEY_AMAX), torch.tensor([VALUE_AMAX])


def sharded_scales(name, parallel, dtype):
    """Return a lookup (layer, linear) -> scales of this rank's shard."""

    def get_scales(layer, linear):
        whole = whole_scales(name, layer, linear, dtype)
        return shard_scales(whole, linear, parallel.tensor_rank, parallel.layout.tensor)

    return get_scales


def random_model(parallel, dtype):
    """Build the decoder with random weights that do not depend on the layout."""
    model = build_decoder(DECODER, parallel, dtype)
    t, T = parallel.tensor_rank, parallel.layout.tensor
    for parameter in model.parameters():
        parameter.fill_(1.0)
    for layer, linear, module in quantizers.decoder_linears(model):
        module.weight.copy_(shard_weight(whole_weight(layer, linear), linear, t, T))
    for seed, module in enumerate((model.embedding.word_embeddings, model.output_layer)):
        whole = random_tensor(PADDED_VOCAB, 256, seed=77 + seed) * 0.06
        module.weight.copy_(whole.chunk(T)[t])
    return model


def model_with_quantizers(parallel, name, kv_cache, dtype):
    """Build the decoder with quantizers, but without weights and scales."""
    model = build_decoder(DECODER, parallel, dtype)
    quantizers.insert_quantizers(model, FORMATS[name], GROUP_SIZE, KV_CACHES.get(kv_cache))
    return model


def fill_quantizers(model, parallel, name, kv_cache, dtype):
    get_scales = sharded_scales(name, parallel, dtype)
    quantizers.fill_quantizers(
        model, FORMATS[name], get_scales, None if kv_cache == "none" else get_kv_amax
    )


def quantized_model(parallel, name, kv_cache, dtype):
    """Build the quantized model that solve writes."""
    fmt, model = FORMATS[name], random_model(parallel, dtype)
    quantizers.insert_quantizers(model, fmt, GROUP_SIZE, KV_CACHES.get(kv_cache))
    layers = range(DECODER.layers)
    quantizers.prepare_weights(model, fmt, sharded_scales(name, parallel, dtype), layers)
    fill_quantizers(model, parallel, name, kv_cache, dtype)
    return model


def compute_logits(model):
    """Return logits [S,V] of INPUT_IDS."""
    return model(INPUT_IDS, INPUT_IDS, None)[0, :, : DECODER.vocab].float()

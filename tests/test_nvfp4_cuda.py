"""fake_quantize_nvfp4 on the CPU equals modelopt's CUDA kernel bit for bit, except at ties.

The kernel divides with Triton's `/`, which may be off by two ulp. A value may therefore differ if
a quotient lies that close to a tie between two codes; the products are bit-identical.
"""

import itertools

import pytest
import torch

from nemo_vlm_ptq.formats import MAX_CODE, NVFP4_BLOCK
from nemo_vlm_ptq.numerics import (
    E2M1_MAGNITUDES,
    E4M3_MAX,
    NVFP4_MIN_SCALE,
    fake_quantize,
    fake_quantize_nvfp4,
    nudge_off_ties,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="modelopt's nvfp4 kernel needs a CUDA device"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 16), (3, 48), (7, 5, 64), (33, 1040), (2, 3, 4, 32), (64, 1024)]
TIE_MARGIN = 2.0**-21  # relative; four ulp of float32


def modelopt_kernel(x, amax):
    """Return what modelopt's quantizers compute with the preset NVFP4_DEFAULT_CFG."""
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

    found = dynamic_block_quant(x.cuda(), NVFP4_BLOCK, amax.cuda(), None, (2, 1), (4, 3))
    return found.cpu()


def near_tie(x, amax):
    """Return a mask of values that, or whose block scales, are near a tie between two codes."""
    blocks = x.double().unflatten(-1, (-1, NVFP4_BLOCK))
    global_scale = amax.double() / (MAX_CODE["nvfp4"] * E4M3_MAX)
    block_amax = blocks.abs().amax(dim=-1, keepdim=True)
    block_scale = block_amax / MAX_CODE["nvfp4"] / global_scale
    low, high = (
        (block_scale * (1 + shift)).float().clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).double()
        for shift in (-TIE_MARGIN, TIE_MARGIN)
    )
    scale = high * global_scale
    near_min_scale = (scale / NVFP4_MIN_SCALE - 1).abs() < TIE_MARGIN
    scale = torch.where(scale >= NVFP4_MIN_SCALE, scale, torch.ones_like(scale))
    bounds = [(a + b) / 2 for a, b in itertools.pairwise(E2M1_MAGNITUDES)]
    at_bound = sum(
        ((blocks.abs() / scale / bound - 1).abs() < TIE_MARGIN).int() for bound in bounds
    )
    return ((low != high) | near_min_scale | at_bound.bool()).flatten(-2)


def samples():
    """Return name -> function that makes a float32 tensor of a shape."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=generator)

    def wide_range(shape):  # magnitudes over twelve decades
        return normal(shape) * 10.0 ** (12 * torch.rand(shape, generator=generator) - 8)

    def zero_blocks(shape):
        x = normal(shape) * 0.02
        x.view(-1, NVFP4_BLOCK)[::2] = 0
        return x

    def mixed_blocks(shape):  # block amax of all sizes, some below the range of a scale
        x = normal(shape)
        blocks = x.view(-1, NVFP4_BLOCK)
        blocks.mul_(2.0 ** -torch.arange(len(blocks)).remainder(24)[:, None])
        return x

    return {
        "normal": normal,
        "wide range": wide_range,
        "zero blocks": zero_blocks,
        "mixed blocks": mixed_blocks,
        "zeros": torch.zeros,
        "minus zeros": lambda shape: -torch.zeros(shape),
        "tiny": lambda shape: normal(shape) * 1e-7,
        "huge": lambda shape: normal(shape) * 2000,
        "codes": lambda shape: torch.randint(-12, 13, shape, generator=generator) / 2,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", samples())
def test_the_kernel_gives_the_same_bits_except_near_ties(name, dtype):
    compared = skipped = 0
    for shape in SHAPES:
        x = samples()[name](shape).clamp(-6e4, 6e4).to(dtype)
        x_amax = x.float().abs().amax()
        for amax in (x_amax, x_amax.bfloat16(), 0.3 * x_amax, 5 * x_amax, torch.tensor(4.0)):
            found, expected = modelopt_kernel(x, amax), fake_quantize_nvfp4(x, amax)
            assert found.dtype == expected.dtype == dtype
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            differ = found.view(bits) != expected.view(bits)
            tie = near_tie(x, amax)
            assert not (differ & ~tie).any(), (shape, float(amax))
            compared, skipped = compared + x.numel(), skipped + int((differ & tie).sum())
    assert skipped <= 0.01 * compared


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_computes_the_exported_codes_of_weights_off_ties(dtype):
    """The kernel's scales differ from the exported ones by some ulp."""
    torch.manual_seed(0)
    for amax in torch.linspace(0.08, 0.16, 41).bfloat16():
        steps = amax.float() / (MAX_CODE["nvfp4"] * E4M3_MAX)
        halves = torch.randint(16, 33, (256, 16, 1)) / 2  # of the steps of e4m3 from 8 to 16
        scales = halves * 2.0 ** torch.randint(0, 5, (256, 16, 1))
        codes = torch.randint(-20, 21, (256, 16, NVFP4_BLOCK)) / 4
        codes[..., 0] = 6
        weight = nudge_off_ties((codes * scales * steps).flatten(1).to(dtype), amax, "nvfp4")
        exported = fake_quantize(weight, amax, "nvfp4")
        found = modelopt_kernel(weight.float(), amax)
        torch.testing.assert_close(found, exported, rtol=2.0**-20, atol=0)

"""Our nvfp4 on a CPU says what modelopt's CUDA kernel says.

The kernel divides with Triton's `/`, which may be two units off in the last place. So a number may
differ where a quotient lies that close to half way between two codes, and nowhere else; its
products are the same bits.
"""

import itertools

import pytest
import torch

from nemo_vlm_ptq.formats import MAX_CODE, NVFP4_BLOCK
from nemo_vlm_ptq.numerics import (
    E2M1,
    E4M3_MAX,
    NVFP4_MIN_SCALE,
    fake_quantize,
    fake_quantize_nvfp4,
    nudge_off_ties,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="modelopt's nvfp4 kernel needs CUDA; none is here"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 16), (3, 48), (7, 5, 64), (33, 1040), (2, 3, 4, 32), (64, 1024)]
NEAR = 2.0**-21  # relative; four units in the last place of float32


def on_cuda(x, amax):
    """What modelopt's quantizers do with the preset NVFP4_DEFAULT_CFG."""
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

    found = dynamic_block_quant(x.cuda(), NVFP4_BLOCK, amax.cuda(), None, (2, 1), (4, 3))
    return found.cpu()


def half_way(x, amax):
    """Where a number, or the scale of its block, is next to half way between two codes."""
    blocks = x.double().unflatten(-1, (-1, NVFP4_BLOCK))
    second = amax.double() / (MAX_CODE["nvfp4"] * E4M3_MAX)
    top = blocks.abs().amax(dim=-1, keepdim=True) / MAX_CODE["nvfp4"] / second
    low, high = (
        (top * (1 + shift)).float().clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).double()
        for shift in (-NEAR, NEAR)
    )
    scale = high * second
    silent = (scale / NVFP4_MIN_SCALE - 1).abs() < NEAR
    scale = torch.where(scale >= NVFP4_MIN_SCALE, scale, torch.ones_like(scale))
    bounds = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    near = sum(((blocks.abs() / scale / bound - 1).abs() < NEAR).int() for bound in bounds)
    return ((low != high) | silent | near.bool()).flatten(-2)


def samples():
    """Name -> float32 numbers of a shape."""
    dice = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=dice)

    def wide(shape):  # magnitudes over twelve decades
        return normal(shape) * 10.0 ** (12 * torch.rand(shape, generator=dice) - 8)

    def holes(shape):
        x = normal(shape) * 0.02
        x.view(-1, NVFP4_BLOCK)[::2] = 0
        return x

    def uneven(shape):  # blocks of all sizes, some below what a scale can hold
        x = normal(shape)
        blocks = x.view(-1, NVFP4_BLOCK)
        blocks.mul_(2.0 ** -torch.arange(len(blocks)).remainder(24)[:, None])
        return x

    return {
        "normal": normal,
        "wide": wide,
        "holes": holes,
        "uneven": uneven,
        "zeros": torch.zeros,
        "minus zeros": lambda shape: -torch.zeros(shape),
        "tiny": lambda shape: normal(shape) * 1e-7,
        "huge": lambda shape: normal(shape) * 2000,
        "codes": lambda shape: torch.randint(-12, 13, shape, generator=dice) / 2,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", samples())
def test_the_kernel_says_the_same_bits(name, dtype):
    compared = skipped = 0
    for shape in SHAPES:
        x = samples()[name](shape).clamp(-6e4, 6e4).to(dtype)
        top = x.float().abs().amax()
        for amax in (top, top.to(torch.bfloat16), 0.3 * top, 5 * top, torch.tensor(4.0)):
            found, expected = on_cuda(x, amax), fake_quantize_nvfp4(x, amax)
            assert found.dtype == expected.dtype == dtype
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            differ = found.view(bits) != expected.view(bits)
            near = half_way(x, amax)
            assert not (differ & ~near).any(), (shape, float(amax))
            compared, skipped = compared + x.numel(), skipped + int((differ & near).sum())
    assert skipped <= 0.01 * compared


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_finds_the_exported_codes_of_weights_off_ties(dtype):
    """Its scales differ from those that are exported by some units in the last place."""
    torch.manual_seed(0)
    for amax in torch.linspace(0.08, 0.16, 41).bfloat16():
        steps = amax.float() / (MAX_CODE["nvfp4"] * E4M3_MAX)
        halves = torch.randint(16, 33, (256, 16, 1)) / 2  # of the steps of e4m3 from 8 to 16
        scales = halves * 2.0 ** torch.randint(0, 5, (256, 16, 1))
        codes = torch.randint(-20, 21, (256, 16, NVFP4_BLOCK)) / 4
        codes[..., 0] = 6
        weight = nudge_off_ties((codes * scales * steps).flatten(1).to(dtype), amax, "nvfp4")
        exported = fake_quantize(weight, amax, "nvfp4")
        found = on_cuda(weight.float(), amax)
        torch.testing.assert_close(found, exported, rtol=2.0**-20, atol=0)

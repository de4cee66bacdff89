"""Floating-point formats: compared with torch's float8 and the table of E2M1, and the laws of all quantizers."""

import itertools

import pytest
import torch

from spinquant import SchemeError, parse_scheme
from spinquant.quantization.floating import E2M1, from_bits, nearest, scale_of, tensor_factor, to_bits, within_reach
from spinquant.quantization.integer import dequantize, fake_quantize, quantize, quantize_on_grid
from spinquant.quantization.rtn import CLIP_RATIOS, quantize_weight
from spinquant.quantization.scheme import PRESETS, Quantizer, Scheme

FP8 = Quantizer(8, symmetric=True, kind="fp8")
NVFP4 = Quantizer(4, symmetric=True, group_size=16, kind="nvfp4")
MXFP4 = Quantizer(4, symmetric=True, group_size=32, kind="mxfp4")
QUANTIZERS = [FP8, NVFP4, MXFP4]
NUMBERS = {"fp8": [b for b in range(256) if b & 127 != 127], "nvfp4": range(16), "mxfp4": range(16)}


def sample(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[..., 3] *= 20
    return x.to(dtype)


@pytest.mark.parametrize("kind", NUMBERS)
def test_bit_patterns_and_numbers_are_one_to_one(kind):
    bits = torch.tensor([b for b in NUMBERS[kind] if from_bits(torch.tensor([b]), kind).item() != 0 or b == 0])
    numbers = from_bits(bits, kind)
    assert torch.equal(to_bits(numbers, kind), bits.int())
    assert torch.equal(nearest(numbers, kind), numbers)  # the numbers of a format are its fixed points
    assert len(set(numbers.tolist())) == len(bits)


@pytest.mark.parametrize("kind", NUMBERS)
def test_nearest_finds_the_nearest_number_of_the_format(kind):
    x = torch.linspace(-500, 500, 20001) if kind == "fp8" else torch.linspace(-8, 8, 4001)
    numbers = from_bits(torch.tensor(list(NUMBERS[kind])), kind).double()
    best = (x.double().unsqueeze(1) - numbers).abs().amin(dim=1)
    assert torch.equal((nearest(x, kind).double() - x.double()).abs(), best)


def test_ties_go_to_the_even_code():
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1)])
    assert (to_bits(nearest(middles, "mxfp4"), "mxfp4") % 2 == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.kind)
def test_packed_and_rounded_numbers_are_the_same(quantizer, dtype):
    x = sample(5, 64, dtype=dtype)
    packed = quantize(x, quantizer)
    assert packed.words.nbytes * 8 == x.numel() * quantizer.bits
    assert torch.equal(dequantize(packed), fake_quantize(x, quantizer))
    again = quantize_on_grid(dequantize(packed), packed.scale, None, quantizer)
    assert torch.equal(dequantize(again), dequantize(packed))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.kind)
def test_the_error_is_bounded_by_the_mantissa(quantizer):
    x = sample(6, 64, dtype=torch.float64)
    groups = x.unflatten(-1, (-1, quantizer.group_size or 64))
    peak = groups.abs().amax(-1, keepdim=True)
    error = (fake_quantize(x, quantizer).view_as(groups) - groups).abs()
    # Half a step: 2^-4 of the number for E4M3, 2^-2 for E2M1, and half the smallest step near zero. Scales that are
    # rounded (nvfp4 by 2^-4, mxfp4 down to 6/7) clip the largest numbers.
    share, small, clipped = {
        "fp8": (2**-4, 2**-18, 0),
        "nvfp4": (2**-2, 1 / 22, 2**-4),
        "mxfp4": (2**-2, 1 / 7, 1 / 7),
    }[quantizer.kind]
    assert (error <= groups.abs() * share + peak * max(small, clipped)).all()


def test_scales_are_representable_in_their_formats():
    peak = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100
    power = scale_of(peak, "mxfp4")
    assert torch.equal(torch.frexp(power).mantissa, torch.full_like(power, 0.5))
    assert ((peak / power < 7) & (peak / power >= 3.5)).all()
    peaks = torch.cat([peak, peak * 1e-9])
    scale = within_reach(scale_of(peaks, "nvfp4"), peaks)
    stored = scale / tensor_factor(scale)
    assert torch.equal(stored.to(torch.float8_e4m3fn).float(), stored)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.kind)
def test_zeros_stay_zero_and_tokens_are_independent(quantizer):
    assert torch.equal(fake_quantize(torch.zeros(2, 64), quantizer), torch.zeros(2, 64))
    x = sample(6, 64)
    assert torch.equal(fake_quantize(x, quantizer)[2], fake_quantize(x[2], quantizer))


def test_groups_of_zeros_do_not_coarsen_the_others():
    """A group of zeros needs no scale, and must not raise the scales of groups of small numbers."""
    x = sample(4, 64) * 1e-6
    alone = dequantize(quantize(x, NVFP4))
    x = torch.cat([x, torch.zeros(1, 64)])
    assert torch.equal(dequantize(quantize(x, NVFP4)), torch.cat([alone, torch.zeros(1, 64)]))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.kind)
def test_no_clip_ratio_is_better_than_the_searched_one(quantizer):
    weight = sample(6, 64)
    options = {"bits": quantizer.bits, "symmetric": True, "group_size": quantizer.group_size, "kind": quantizer.kind}
    found = dequantize(quantize_weight(weight, Quantizer(**options, clip="mse")))
    best = (found - weight).square().sum()
    for ratio in CLIP_RATIOS:
        error = (fake_quantize(weight, Quantizer(**options, clip=ratio)) - weight).square().sum()
        assert best <= error * (1 + 1e-5)


@pytest.mark.parametrize("text", [*PRESETS, "WFP8A16", "W4AFP8", "WMXFP4A16", "AFP8"])
def test_floating_notation(text):
    scheme = parse_scheme(text, weight_clip=1.0)
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert parse_scheme(str(scheme), weight_clip=1.0) == scheme


def test_presets_match_compressed_tensors():
    assert parse_scheme("fp8_dynamic").weights == Quantizer(8, symmetric=True, clip="mse", kind="fp8")
    assert parse_scheme("NVFP4A16").activations is None
    assert parse_scheme("MXFP4").activations == MXFP4


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "kind": "nvfp4", "symmetric": True, "group_size": 16},
        {"bits": 4, "kind": "nvfp4", "symmetric": True, "group_size": 32},
        {"bits": 4, "kind": "mxfp4", "symmetric": False, "group_size": 32},
        {"bits": 8, "kind": "fp9", "symmetric": True},
    ],
)
def test_formats_that_do_not_exist_are_refused(options):
    with pytest.raises(SchemeError, match=options["kind"]):
        Quantizer(**options)


def test_a_group_size_other_than_the_formats_is_refused():
    with pytest.raises(SchemeError, match="groups of 16"):
        parse_scheme("NVFP4A16", group_size=64)

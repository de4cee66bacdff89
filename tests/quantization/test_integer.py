from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import tiny_model
from spinquant import SchemeError, parse_scheme, plan_of
from spinquant.quantization.integer import (
    _rounded_to,
    dequantize,
    fake_quantize,
    grid,
    pack,
    quantize,
    quantize_on_grid,
    unpack,
)
from spinquant.quantization.rtn import CLIP_RATIOS, quantize_weight, round_weights, search_clip
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import linears_of

QUANTIZERS = [
    Quantizer(4),
    Quantizer(4, symmetric=True),
    Quantizer(8),
    Quantizer(2, symmetric=True),
    Quantizer(3, group_size=8),
    Quantizer(4, symmetric=True, group_size=16, clip=0.8),
]


def sample(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[..., 3] *= 20  # an outlier channel
    return x.to(dtype)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("W4A4KV4", (4, 4, 4)),
        ("w4a8kv8", (4, 8, 8)),
        ("W4A16", (4, None, None)),
        ("W8A8", (8, 8, None)),
        ("KV4", (None, None, 4)),
        ("W4A16KV16", (4, None, None)),
        ("none", (None, None, None)),
    ],
)
def test_notation(text, parts):
    scheme = parse_scheme(text)
    assert tuple(q.bits if q else None for q in (scheme.weights, scheme.activations, scheme.kv)) == parts
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert parse_scheme(str(scheme)) == scheme or text == "none"


def test_groups_in_notation():
    assert parse_scheme("W4g128A16").weights.group_size == 128
    assert parse_scheme("W4A16_g64").weights.group_size == 64
    assert parse_scheme("W4A4", group_size=32).weights.group_size == 32
    assert parse_scheme("W4A4").weights.symmetric
    assert not parse_scheme("W4A4").activations.symmetric
    assert parse_scheme("W4A4", activation_symmetric=True).activations.symmetric


@pytest.mark.parametrize("text", ["", "W", "4bit", "W4A4KV", "A4W4", "W1A4", "W9A16", "FOO", "W4A4KV4X"])
def test_unreadable_schemes_are_refused(text):
    with pytest.raises(SchemeError):
        parse_scheme(text)


def test_options_without_effect_are_refused():
    with pytest.raises(SchemeError, match="several group sizes"):
        parse_scheme("W4g64A16", group_size=128)
    with pytest.raises(SchemeError, match="does not quantize weights"):
        parse_scheme("A8", group_size=64)
    with pytest.raises(SchemeError, match="group size is 0"):
        parse_scheme("W4A16", group_size=0)


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"clip": 1.5}, {"group_size": 0}, {"bits": 1}])
def test_bad_quantizers_are_refused(options):
    with pytest.raises(SchemeError):
        Quantizer(**{"bits": 4, **options})


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [1, 7, 64, 65])
def test_packing_is_lossless(bits, length):
    codes = torch.randint(0, 2**bits, (3, length), generator=torch.Generator().manual_seed(bits))
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape[-1] == -(-length // (32 // bits))
    assert torch.equal(unpack(words, bits, length), codes.int())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_packed_and_rounded_numbers_are_the_same(quantizer, dtype):
    x = sample(5, 6, 64, dtype=dtype)
    rounded = fake_quantize(x, quantizer)
    assert torch.equal(dequantize(quantize(x, quantizer)), rounded)
    assert rounded.dtype == dtype
    assert rounded.shape == x.shape


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_error_is_at_most_half_a_step_inside_the_range(quantizer):
    x = sample(8, 64, dtype=torch.float64)
    groups = x.unflatten(-1, (-1, quantizer.group_size or 64))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if quantizer.symmetric:
        step = torch.maximum(high, -low) * quantizer.clip / (2 ** (quantizer.bits - 1) - 1)
    else:
        step = (high - low) / quantizer.top
    error = (fake_quantize(x, quantizer).view_as(groups) - groups).abs()
    inside = (groups >= low * quantizer.clip) & (groups <= high * quantizer.clip)
    # An integer zero point may shift an asymmetric grid by half a step more.
    allowed = step * (0.5 if quantizer.symmetric else 1.0) * (1 + 1e-9)
    assert ((error <= allowed) | ~inside).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_rounding_is_idempotent_on_its_own_grid(quantizer):
    packed = quantize(sample(4, 64), quantizer)
    again = quantize_on_grid(dequantize(packed), packed.scale, packed.zero, quantizer)
    assert all(torch.equal(a, b) for a, b in zip(packed.tensors(), again.tensors(), strict=True))


def test_zeros_and_constants_are_exact():
    for quantizer in QUANTIZERS:
        assert torch.equal(fake_quantize(torch.zeros(2, 64), quantizer), torch.zeros(2, 64))
    constant = torch.full((2, 64), 3.0)
    assert torch.allclose(fake_quantize(constant, Quantizer(4)), constant)


def test_tokens_do_not_influence_each_other():
    x = sample(6, 64)
    assert torch.equal(fake_quantize(x, Quantizer(4))[2], fake_quantize(x[2], Quantizer(4)))


def test_long_inputs_are_rounded_block_by_block_to_the_same_numbers():
    x = sample(3000, 64)
    rows = torch.stack([fake_quantize(row, Quantizer(4)) for row in x[:50]])
    assert torch.equal(fake_quantize(x, Quantizer(4))[:50], rows)


def test_gradients_pass_straight_through():
    x = sample(3, 64).requires_grad_()
    (fake_quantize(x, Quantizer(4)) * 2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(SchemeError, match="48"):
        fake_quantize(torch.zeros(2, 64), Quantizer(4, group_size=48))
    with pytest.raises(SchemeError, match="weights only"):
        fake_quantize(torch.zeros(2, 64), Quantizer(4, clip="mse"))


@pytest.mark.parametrize("group_size", [None, 16])
def test_the_searched_clip_has_the_least_error(group_size):
    weight = sample(6, 64)
    searched = Quantizer(4, symmetric=True, group_size=group_size, clip="mse")
    found = dequantize(quantize_weight(weight, searched))
    best = (found - weight).square().unflatten(-1, (-1, group_size or 64)).sum(-1)
    for ratio in CLIP_RATIOS:
        fixed = Quantizer(4, symmetric=True, group_size=group_size, clip=ratio)
        error = (fake_quantize(weight, fixed) - weight).square().unflatten(-1, (-1, group_size or 64)).sum(-1)
        assert (best <= error * (1 + 1e-5)).all()
    assert search_clip(weight, searched).min() < 1  # with an outlier per row, clipping pays


def test_rtn_quantizes_weights_in_place_and_not_the_head():
    model = tiny_model("llama-tied", dtype=torch.float32)
    plan, scheme = plan_of(model), parse_scheme("W4A16")
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    seen = []
    round_weights(model, plan, scheme, progress=lambda *n: seen.append(n))
    names = linears_of(plan, scheme)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        linear = name.removesuffix(".weight")
        if linear in names and name.endswith("weight"):
            assert torch.equal(parameter, dequantize(quantize_weight(before[name], scheme.weights)))
            assert len({*parameter[0].tolist()}) <= 16
        else:
            assert torch.equal(parameter, before[name])
    assert seen[-1] == (len(names), len(names))


def test_a_quantized_head_is_untied_first():
    model = tiny_model("llama-tied", dtype=torch.float32)
    embedding = model.model.embed_tokens.weight.detach().clone()
    round_weights(model, plan_of(model), parse_scheme("W4A16", lm_head=True))
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert len({*model.lm_head.weight[0].tolist()}) <= 16
    assert model.config.tie_word_embeddings is False


def test_the_error_names_the_weight_whose_group_size_does_not_fit():
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(SchemeError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        round_weights(model, plan_of(model), parse_scheme("W4g32A16"))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_scales_are_rounded_in_arithmetic_as_by_a_cast(stored):
    """To the last bit, for numbers of every exponent, midpoints of the dtype, and what overflows."""
    every = torch.arange(2**15, dtype=torch.int16).view(stored).float()
    bits = torch.randint(2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    numbers = torch.cat([every, (every + every.roll(1)) / 2, bits.view(torch.float32)])
    assert torch.equal(*(torch.nan_to_num(x, -1.0) for x in (_rounded_to(numbers, stored), numbers.to(stored).float())))


@pytest.mark.parametrize("quantizer", [Quantizer(4), Quantizer(3, symmetric=True), Quantizer(4, group_size=8)])
def test_a_clip_ratio_as_a_tensor_rounds_as_a_number_and_gets_the_gradient_of_its_scale(quantizer):
    """Against autograd through the formula, with the scale proportional to the ratio and rounding passed through."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64).requires_grad_(True)
    weights = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    ratio = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = fake_quantize(x, quantizer, ratio)
    assert torch.equal(found, fake_quantize(x, replace(quantizer, clip=0.7)))
    (found * weights).sum().backward()
    assert torch.equal(x.grad, weights)

    rows, again = x.detach().view(-1, quantizer.group_size or 16), ratio.detach().clone().requires_grad_(True)
    scale, zero = grid(rows, quantizer, rows.dtype, clip=0.7)
    moving = scale * again / 0.7
    code = torch.round(rows / scale) + zero
    inside = (code >= 0) & (code <= quantizer.top)
    passed = code + (rows / moving - rows / scale)  # rounded, with the derivative of what is rounded
    codes = torch.where(inside, passed, code.clamp(0, quantizer.top))
    (((codes - zero) * moving).view(5, 16) * weights).sum().backward()
    assert ratio.grad == pytest.approx(float(again.grad))
    assert inside.any() and not inside.all()


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_gpu_a_large_tensor_takes_no_more_operations_than_a_small_one(bits):
    """Every operation there is a launch; blocks are for the caches of a CPU."""
    quantizer = Quantizer(bits=bits)

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    def operations(rows, device):
        x = torch.ones(rows, 512, device=device)
        with Counting() as mode:
            fake_quantize(x, quantizer)
            dequantize(quantize(x, quantizer))
        return mode.count

    assert operations(8, "meta") == operations(4096, "meta")
    assert operations(8, "cpu") < operations(4096, "cpu")

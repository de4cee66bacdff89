"""Laws of the Hadamard matrices and of the transform: orthogonality, agreement with dense products, linearity."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard
from torch._subclasses.fake_tensor import FakeTensorMode

from spinquant.errors import HadamardOrderError, RotationError
from spinquant.rotations import fast_transform as kronecker
from spinquant.rotations import hadamard
from spinquant.rotations.hadamard import (
    Construction,
    construct,
    hadamard_factors,
    hadamard_matrix,
    hadamard_transform,
    kronecker_transform,
)

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "hadamard-orders.md"
# Odd parts of the dimensions of released models, with their base orders.
BASES = (12, 20, 28, 36, 40, 52, 60, 76, 92, 108, 116, 140, 148, 156, 172, 684, 924)
MODEL_DIMENSIONS = (576, 896, 1536, 3584, 4864, 9728, 10944, 11008, 13824, 14336, 18944, 28672, 29568)


def constructible(order: int) -> bool:
    try:
        construct(order)
    except HadamardOrderError:
        return False
    return True


@pytest.fixture(params=["kernels", "no kernels"])
def either_way(request, monkeypatch):
    """With compiled butterflies, and without numba."""
    if request.param == "no kernels":
        monkeypatch.setattr(kronecker, "kernels", lambda: None)
    else:
        pytest.importorskip("numba")
        monkeypatch.setattr(hadamard, "KERNELS_FROM", 1)
    return request.param == "kernels"


COVERED = [1, 2, *(n for n in range(4, 500, 4) if constructible(n))]


def dense(order: int) -> torch.Tensor:
    return hadamard_matrix(order).double() / order**0.5


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def rounding(x: torch.Tensor, dim: int, terms: int) -> float:
    """How far dot products of `terms` terms with rows of length one may be off: terms x eps x the length of x."""
    return terms * torch.finfo(x.dtype).eps * float(torch.linalg.vector_norm(x, dim=dim).max())


def terms_of(order: int) -> int:
    """Terms that a number of the result is summed from, factor by factor."""
    return sum(size for _, size in construct(order).factors)


@pytest.mark.parametrize("order", [*COVERED, 684, 924])
def test_rows_are_orthogonal_and_entries_are_signs(order: int):
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.int8 and matrix.shape == (order, order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix.double() @ matrix.double().T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix, hadamard_matrix(order))


@pytest.mark.parametrize("order", [*COVERED, 684, 924])
def test_factors_are_orthonormal_and_multiply_to_the_matrix(order: int):
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in hadamard_factors(order):
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor)).double(), rtol=0, atol=1e-12)
        product = torch.kron(product, factor)
    torch.testing.assert_close(product, dense(order), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [28, 236])
def test_matrices_do_not_inherit_default_device_or_inference_mode(order: int):
    hadamard_factors.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        hadamard_matrix(order)
        hadamard_factors(order)
    for tensor in (hadamard_matrix(order), *hadamard_factors(order)):
        assert tensor.device.type == "cpu" and not tensor.is_inference()


@pytest.mark.parametrize("exponent", range(10))
def test_powers_of_two_are_sylvester(exponent: int):
    assert torch.equal(hadamard_matrix(2**exponent), torch.from_numpy(scipy_hadamard(2**exponent)).to(torch.int8))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("exponent", [0, 1, 5, 9])
def test_model_bases_times_powers_of_two_are_covered(base: int, exponent: int):
    construction = construct(base << exponent)
    product = 1
    for _, order in construction.factors:
        product *= order
    assert product == construction.order == base << exponent


@pytest.mark.parametrize("order", MODEL_DIMENSIONS)
def test_construction_takes_small_bases(order: int):
    assert max(base for name, base in construct(order).factors if name != "Sylvester") <= 172


def test_a_construction_is_described_without_building_the_matrix():
    assert str(construct(11008)) == "Sylvester 64 x " + str(construct(172))
    assert str(construct(896)) == "Paley II 28 x Sylvester 32"
    assert construct(1) == Construction(1, (("Sylvester", 1),))
    assert construct(43 << 40).order == 43 << 40


@pytest.mark.parametrize("order", [0, -4, 3, 6, 18, 90])
def test_impossible_orders_are_refused(order: int):
    with pytest.raises(HadamardOrderError, match=rf"order {order}: no Hadamard matrix .*random-matrix"):
        construct(order)


@pytest.mark.parametrize("order", [428, 13696])
def test_unknown_orders_name_the_alternatives(order: int):
    power = order & -order
    with pytest.raises(HadamardOrderError, match=rf"order {order}: none .*`block_size`.*{power}.*random-matrix.*auto"):
        hadamard_matrix(order)


def test_docs_list_the_orders_that_are_not_covered():
    line = re.search(r"Not covered below 500: ([\d, ]+)\.", DOCS.read_text())
    assert line is not None
    missing = [n for n in range(4, 500, 4) if not constructible(n)]
    assert [int(n) for n in line[1].split(",")] == missing


def test_docs_table_of_model_dimensions():
    rows = re.findall(r"^\| (\d+) \| (\w[^|]* \d+) \|$", DOCS.read_text().split("## Dimensions")[1], re.MULTILINE)
    assert len(rows) > 10
    for order, construction in rows:
        # The order of the factors is a matter of speed, not of the construction.
        assert sorted(construction.split(" x ")) == sorted(str(construct(int(order))).split(" x ")), order


@pytest.mark.parametrize("order", [1, 2, 8, 12, 24, 64, 92, 116, 144, 148, 172, 184, 512, 896, 1024, 2048, 2752])
@pytest.mark.parametrize("transpose", [False, True])
def test_transform_is_the_dense_product_in_every_block(order: int, transpose: bool, either_way):
    x = random(3, 2, 2 * order)
    rotation = dense(order).T if transpose else dense(order)
    expected = (x.unflatten(-1, (2, order)) @ rotation).flatten(-2)
    before = x.clone()
    torch.testing.assert_close(hadamard_transform(x, order, transpose=transpose), expected, rtol=0, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("exponent", range(1, 14))
@pytest.mark.parametrize("behind", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_butterflies_equal_the_matrix_product(exponent: int, behind: int, dtype: torch.dtype):
    pytest.importorskip("numba")
    order = 2**exponent
    x = random(3, order, behind, dtype=dtype)
    found = kronecker_transform(x, (kronecker.Sylvester(order),), dim=1)
    once = rounding(x, 1, exponent + 1)  # a step for each power of two, and the scale
    if order <= 1024:
        expected = torch.einsum("ij,bjw->biw", dense(order), x.double()).to(dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=once)
    if exponent > 1:
        terms = 2 ** (exponent - exponent // 2)
        parts = kronecker.Sylvester(2 ** (exponent // 2)), dense(terms).to(dtype)
        atol = 2 * once + rounding(x, 1, terms)
        torch.testing.assert_close(kronecker_transform(x, parts, dim=1), found, rtol=0, atol=atol)
    again = kronecker_transform(found, (kronecker.Sylvester(order),), dim=1)
    torch.testing.assert_close(again, x, rtol=0, atol=2 * once)


@pytest.mark.parametrize("order", [0, 1, 12])
def test_butterflies_need_a_power_of_two(order: int):
    with pytest.raises(RotationError, match=f"not {order}"):
        kronecker.Sylvester(order)


def test_butterflies_are_used_on_plain_cpu_tensors(either_way):
    calls, x = [], random(64, 4096, dtype=torch.float32)
    found = kronecker.kernels()

    class Counted:
        def rows(self, *arguments):
            calls.append("rows")
            found.rows(*arguments)

        def columns(self, *arguments):
            calls.append("columns")
            found.columns(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kronecker, "kernels", lambda: Counted() if either_way else None)
        for order, dim in ((4096, -1), (28 * 128, -1)):
            hadamard_transform(x.narrow(-1, 0, 28 * 128) if order == 28 * 128 else x, order, dim=dim)
        hadamard_transform(x.view(128, 2048), 128, dim=0)
        assert calls == (["rows", "rows", "columns"] if either_way else [])
        calls.clear()
        with kronecker.kernels_for(1000) as small, kronecker.kernels_for(1 << 30) as large:
            hadamard_transform(x, 4096)
        assert not small and not large
        patch.setattr(hadamard, "KERNELS_FROM", 4097)
        hadamard_transform(x, 4096)
        patch.setattr(hadamard, "KERNELS_FROM", 4096)
        hadamard_transform(x, 2048)
        assert not calls
        hadamard_transform(x, 4096)
        assert calls == (["rows"] if either_way else [])
        calls.clear()
        # With gradients, in inference mode, and with meta and fake tensors.
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(hadamard_transform(x, 4096).sum(), x)
        torch.testing.assert_close(gradient, hadamard_transform(torch.ones_like(x), 4096))
        with torch.inference_mode():
            torch.testing.assert_close(hadamard_transform(x, 4096).clone(), hadamard_transform(x.detach(), 4096))
        assert len(calls) == (5 if either_way else 0)
        assert hadamard_transform(x.detach().to("meta"), 4096).shape == x.shape
        plain = x.detach()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert hadamard_transform(mode.from_tensor(plain), 4096).shape == x.shape
        assert len(calls) == (5 if either_way else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [24, 172, 512])
def test_lower_precision_is_rounded_once(order: int, dtype: torch.dtype, either_way):
    x = random(5, order, dtype=dtype)
    exact = x.double() @ dense(order)
    result = hadamard_transform(x, order)
    assert result.dtype == dtype
    # One rounding is half a unit in the last place; the rest is float32's own error.
    bound = 0.5 * torch.finfo(dtype).eps * exact.abs() + 4 * order**0.5 * torch.finfo(torch.float32).eps
    assert bool(((result.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("order", [16, 28, 172, 4096, 14336])
def test_results_do_not_depend_on_the_number_of_chunks(order: int, either_way):
    x = random(2_000_000 // order + 3, order, dtype=torch.float32)  # longer than one chunk
    result = hadamard_transform(x, order)
    rows = torch.tensor([0, len(x) // 2, len(x) - 1])
    expected = hadamard_transform(x[rows], order)
    torch.testing.assert_close(result[rows], expected, rtol=0, atol=2 * rounding(x[rows], -1, terms_of(order)))


@pytest.mark.parametrize("order", [28, 92, 172, 4096])
def test_transpose_inverts(order: int):
    x = random(4, order)
    there = hadamard_transform(x, order)
    assert not torch.allclose(there, x)
    torch.testing.assert_close(hadamard_transform(there, order, transpose=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [16, 28, 172, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_the_input(order: int, dtype: torch.dtype):
    x = random(7, order, dtype=dtype)
    expected = hadamard_transform(x, order)
    out = torch.empty_like(x)
    assert torch.equal(hadamard_transform(x, order, out=out), expected)
    assert torch.equal(out, expected)
    hadamard_transform(x, order, out=x)
    assert torch.equal(x, expected)


def test_out_must_fit():
    with pytest.raises(RotationError, match="contiguous"):
        hadamard_transform(random(2, 4), 4, out=random(2, 8)[:, ::2])


def test_transform_is_linear():
    x, y = random(2, 4, 172)
    combined = hadamard_transform(2 * x - 3 * y, 172)
    torch.testing.assert_close(
        combined, 2 * hadamard_transform(x, 172) - 3 * hadamard_transform(y, 172), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("transpose", [False, True])
def test_gradient_is_the_transposed_transform(transpose: bool):
    factors = (random(3, 3), random(4, 4))
    x = random(2, 24).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kronecker_transform(x, factors, transpose=transpose), x)
    assert torch.autograd.gradgradcheck(lambda x: kronecker_transform(x, factors, transpose=transpose) ** 2, x)


@pytest.mark.parametrize("sizes", [(3,), (5, 8), (3, 4, 7), (1, 6), (70,), (64, 3)])
@pytest.mark.parametrize("transpose", [False, True])
def test_any_square_factors_equal_their_kronecker_product(sizes: tuple[int, ...], transpose: bool):
    factors = tuple(random(size, size) for size in sizes)
    full = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        full = torch.kron(full, factor)
    x = random(2, 5, len(full))
    expected = x @ (full.T if transpose else full)
    torch.testing.assert_close(kronecker_transform(x, factors, transpose=transpose), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("behind", [1, 4])
def test_split_of_an_exchangeable_factor_changes_nothing(behind: int):
    a, b, c = random(50, 50), random(50, 50).flip(0), random(50, 4)
    factor = torch.cat([torch.cat([a, b, c], 1), torch.cat([b, a, c], 1), torch.cat([c.T, c.T, random(4, 4)], 1)])
    x = random(3, 104 * behind)
    tail = random(behind, behind)
    torch.testing.assert_close(kronecker_transform(x, (factor, tail)), x @ torch.kron(factor, tail))


def test_the_memory_layout_does_not_matter():
    x = random(24, 6, 5).transpose(0, 2)  # (5, 6, 24), not contiguous
    torch.testing.assert_close(hadamard_transform(x, 24), x @ dense(24))
    sliced = random(4, 48)[:, ::2]
    torch.testing.assert_close(hadamard_transform(sliced, 24), sliced @ dense(24))
    assert hadamard_transform(random(0, 24), 24).shape == (0, 24)
    assert hadamard_transform(random(24), 24).shape == (24,)


@pytest.mark.parametrize("shape", [(), (4, 10), (4, 2)])
def test_order_must_divide_the_last_axis(shape: tuple[int, ...]):
    with pytest.raises(RotationError, match=r"order 4 .*multiple"):
        hadamard_transform(torch.ones(shape), 4)


def test_integers_are_refused():
    with pytest.raises(RotationError, match="int64"):
        hadamard_transform(torch.ones(4, dtype=torch.int64), 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [1, 2, 4, 64, 92, 172])
@pytest.mark.parametrize("transpose", [False, True])
def test_transforming_any_axis_equals_moving_it_last(order, dtype, transpose, monkeypatch, either_way):
    """Also for rows longer than a chunk, and in place."""
    monkeypatch.setattr(kronecker, "_CHUNK", order * 20)
    for shape, dim in [((2 * order, 50), 0), ((3, order, 2, 9), 1), ((3, order, 7), -2), ((order, 40), 0)]:
        x = random(*shape).to(dtype)
        expected = hadamard_transform(x.movedim(dim, -1).contiguous(), order, transpose=transpose).movedim(-1, dim)
        wide = x if dtype == torch.float64 else x.float()  # half precision is transformed in float32
        found = hadamard_transform(x, order, transpose=transpose, dim=dim)
        rtol = 0 if wide.dtype == dtype else torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=rtol, atol=2 * rounding(wide, dim, terms_of(order)))
        assert hadamard_transform(x, order, transpose=transpose, dim=dim, out=x) is x
        assert torch.equal(x, found)


def test_threads_and_modes_share_no_working_memory():
    inputs = [random(64, 344) for _ in range(4)]
    expected = [x @ dense(344) for x in inputs]
    with torch.inference_mode():
        hadamard_transform(inputs[0], 344)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, right in zip(pool.map(lambda x: hadamard_transform(x, 344), inputs), expected, strict=True):
                torch.testing.assert_close(found, right, rtol=0, atol=1e-12)

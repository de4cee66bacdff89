"""Laws of invertible transforms: duals and inverses, blocks and heads, products, conditioning, dtypes and tracing."""

import copy
import math

import pytest
import torch

from models import logits, tiny_model, tokens
from models import well_conditioned as square
from spinquant import (
    Composed,
    Diagonal,
    Hadamard,
    Kronecker,
    KroneckerMatrix,
    Matrix,
    Orthogonal,
    RotationError,
    attach,
    plan_of,
)
from spinquant.evaluation.equivalence import TOLERANCE
from spinquant.quantization.moving import Moving
from spinquant.rotations.factory import random_orthogonal, random_signs
from spinquant.rotations.mean_preserving import CentredHadamard, CentredRandomHadamard
from spinquant.rotations.rotation import dual, heads_of, is_orthogonal, matrix, undo
from spinquant.rotations.transforms import (
    LARGEST_CONDITION,
    LARGEST_RATIO,
    apply_to_heads,
    check_conditioned,
    compose,
    condition,
    positional,
)

ORDER, HEADS = 12, 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def scales(*shape, seed=0):
    """Numbers of both signs, from 1/2 to 3/2."""
    sizes = torch.rand(shape, dtype=torch.float64, generator=generator(seed)) + 0.5
    return sizes * normal(*shape, seed=seed + 1).sign()


MADE = {
    "diagonal": lambda: Diagonal(scales(ORDER)),
    "diagonal per head": lambda: Diagonal(scales(HEADS, ORDER)),
    "matrix": lambda: Matrix(square(ORDER, ORDER)),
    "matrix of one head": lambda: Matrix(square(1, ORDER, ORDER)),
    "matrix per head": lambda: Matrix(square(HEADS, ORDER, ORDER)),
    "kronecker": lambda: KroneckerMatrix((square(2, 2), square(6, 6))),
    "kronecker of three": lambda: KroneckerMatrix((square(2, 2), square(3, 3), square(2, 2, seed=5))),
    "scales, then hadamard": lambda: Composed(
        Diagonal(scales(ORDER)), Hadamard(ORDER, random_signs(ORDER, generator()))
    ),
    "hadamard, then matrix per head": lambda: Composed(Hadamard(ORDER), Matrix(square(HEADS, ORDER, ORDER))),
    "scales, then smaller blocks": lambda: Composed(Diagonal(scales(HEADS, ORDER)), Hadamard(4)),
    "smaller blocks, then matrix": lambda: Composed(Diagonal(scales(3)), Matrix(square(ORDER, ORDER))),
    "product of a product": lambda: Composed(MADE["scales, then hadamard"](), KroneckerMatrix((square(12, 12),))),
}
ROTATIONS = {
    "random hadamard": lambda: Hadamard(ORDER, random_signs(ORDER, generator())),
    "hadamard": lambda: Hadamard(ORDER),
    "orthogonal": lambda: Orthogonal(random_orthogonal(ORDER, generator())),
    "kronecker": lambda: Kronecker(random_orthogonal(3, generator()), 4, random_signs(ORDER, generator())),
    "centred": lambda: CentredHadamard(ORDER),
    "centred random": lambda: CentredRandomHadamard(torch.tensor([1, -1, 1, -1], dtype=torch.int8), None),
}
each_transform = pytest.mark.parametrize("name", MADE)


def plainly(transform, x):
    """x T along the last axis with dense matrices, block by block, written without the library's arithmetic."""
    dense = matrix(transform)
    dense = dense if dense.ndim == 3 else dense[None]
    blocks = x.unflatten(-1, (-1, transform.order))
    count = blocks.shape[-2]
    made = [blocks[..., k, :] @ dense[k // (count // len(dense))] for k in range(count)]
    return torch.stack(made, -2).flatten(-2)


def same(one, other, tolerance=1e-12):
    assert one.shape == other.shape and one.dtype == other.dtype
    return bool((one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max())))


@each_transform
def test_a_transform_is_its_dense_matrix_in_every_block(name):
    transform = MADE[name]()
    for blocks in (HEADS, 3 * HEADS):
        x = normal(5, blocks * transform.order, seed=3)
        assert same(transform.apply(x), plainly(transform, x))


def test_dense_matrices_are_those_that_were_given():
    weight, scale = square(HEADS, 4, 4), scales(HEADS, 4)
    assert torch.equal(matrix(Matrix(weight)), weight) and torch.equal(matrix(Diagonal(scale)), torch.diag_embed(scale))
    factors = square(2, 2), square(3, 3)
    assert same(matrix(KroneckerMatrix(factors)), torch.kron(*factors))
    assert same(matrix(Composed(Hadamard(4), Matrix(weight))), matrix(Hadamard(4)) @ weight)


@each_transform
def test_transposing_transforms_by_the_transposed_matrix(name):
    transform = MADE[name]()
    x = normal(3, 2 * HEADS * ORDER)
    transposed = Matrix(matrix(transform).mT.contiguous())
    assert same(transform.apply(x, transpose=True), plainly(transposed, x))


@each_transform
def test_the_dual_keeps_products_and_undoing_is_the_inverse(name):
    transform = MADE[name]()
    x, w = normal(5, 2 * HEADS * ORDER), normal(7, 2 * HEADS * ORDER, seed=1)
    assert same(transform.apply(x) @ transform.dual().apply(w).T, x @ w.T)
    assert same(undo(transform, transform.apply(x)), x) and same(transform.apply(undo(transform, x)), x)
    assert same(matrix(transform.dual()), torch.linalg.inv(matrix(transform)).mT)
    assert transform.dual().dual() is transform and not is_orthogonal(transform)
    assert copy.deepcopy(transform).dual().dual().order == transform.order


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_is_its_own_dual(name):
    rotation = ROTATIONS[name]()
    x = normal(2, 2 * rotation.order)
    assert dual(rotation) is rotation and condition(rotation) == 1.0 and not positional(rotation)
    assert same(undo(rotation, rotation.apply(x)), x)


def test_a_class_without_a_dual_is_a_rotation():
    class Swap:
        order = 2

        def apply(self, x, *, transpose=False, dim=-1, out=None):
            return x.unflatten(dim, (-1, 2)).flip(dim).reshape(x.shape)

    swap = Swap()
    assert dual(swap) is swap and torch.equal(undo(swap, torch.tensor([1.0, 2.0])), torch.tensor([2.0, 1.0]))


@each_transform
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("transpose", [False, True])
def test_every_axis_is_transformed_as_the_last_one_is(name, dim, transpose):
    transform, shape = MADE[name](), [2, 3, 2]
    shape[dim] = HEADS * ORDER
    x = normal(*shape)
    expected = transform.apply(x.movedim(dim, -1).contiguous(), transpose=transpose).movedim(-1, dim)
    assert same(transform.apply(x, transpose=transpose, dim=dim), expected)
    for out in (torch.empty_like(x), x.clone()):
        source = x if out is not x and not torch.equal(out, x) else out
        assert transform.apply(source, transpose=transpose, dim=dim, out=out) is out and same(out, expected)
    view = normal(4, 4, 4, HEADS * ORDER)[1, ::2, :, :].movedim(-1, dim)  # an axis that is not where it is in memory
    expected = transform.apply(view.movedim(dim, -1).contiguous(), transpose=transpose).movedim(-1, dim)
    assert same(transform.apply(view, transpose=transpose, dim=dim), expected)


@each_transform
def test_gradients_are_those_of_the_matrix(name):
    transform = MADE[name]()
    for options, shape in (({}, (1, 24)), ({"transpose": True}, (1, 24)), ({"dim": 0}, (24, 1))):
        x = normal(*shape).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, o=options: transform.apply(x, **o), x)
    x = normal(3, HEADS * ORDER).requires_grad_()
    with pytest.raises(RotationError, match="`out` must be contiguous"):
        transform.apply(x, out=torch.empty_like(x))


@each_transform
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_computed_in_float32_and_rounded_once(name, dtype):
    transform = MADE[name]()
    x = normal(6, HEADS * ORDER, dtype=dtype)
    expected = transform.apply(x.to(torch.float32))
    found = transform.apply(x)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    assert torch.equal(transform.apply(x, out=torch.empty_like(x)), found)
    assert same(expected, transform.apply(x.double()).float(), 1e-5)


@each_transform
def test_a_first_use_in_inference_mode_leaves_later_gradients(name):
    transform = MADE[name]()
    with torch.inference_mode():
        expected = transform.apply(normal(2, HEADS * ORDER))
        undone = undo(transform, expected)
    x = normal(2, HEADS * ORDER).requires_grad_()
    found = transform.apply(x)
    (found.sum() + undo(transform, found).sum()).backward()
    assert same(found.detach(), expected.clone()) and same(undone.clone(), x.detach()) and x.grad is not None


# torch warns of itself: it instantiates every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["diagonal per head", "matrix", "matrix per head", "kronecker", "product of a product"]
)
def test_a_traced_transform_is_the_eager_one(name):
    torch.compiler.reset()
    transform, x = MADE[name](), normal(3, 2 * HEADS * ORDER)

    class Both(torch.nn.Module):
        def forward(self, x):
            y = transform.apply(x)
            heads = apply_to_heads(transform, x.unflatten(-1, (2 * HEADS, 1, -1)))
            return y, undo(transform, y), transform.apply(x.T.contiguous(), transpose=True, dim=0), heads

    expected = Both()(x)
    fresh = MADE[name]()
    traced = torch.compile(lambda x: fresh.apply(x), backend="eager", fullgraph=True)(x)
    assert same(traced, expected[0])
    exported = torch.export.export(Both(), (x,)).module()(x)
    assert all(same(one, other) for one, other in zip(exported, expected, strict=True))


@pytest.mark.parametrize("name", ["diagonal per head", "matrix per head", "scales, then smaller blocks", "matrix"])
def test_heads_may_be_an_axis_of_their_own(name):
    transform = MADE[name]()
    for heads in (HEADS, 3 * HEADS):
        x = normal(2, heads, 5, ORDER)  # (batch, heads, tokens, size)
        rows = x.transpose(1, 2).flatten(2)
        expected = transform.apply(rows).unflatten(-1, (heads, ORDER)).transpose(1, 2)
        assert same(apply_to_heads(transform, x), expected)
        assert same(apply_to_heads(transform.dual(), apply_to_heads(transform, x), transpose=True), x)


def test_queries_that_share_a_key_head_share_its_transform():
    weight = square(HEADS, 4, 4)
    x = normal(3 * HEADS * 4)
    parts = Matrix(weight).apply(x).split(12)
    assert all(same(part, Matrix(weight[i]).apply(x.split(12)[i])) for i, part in enumerate(parts))
    assert positional(Matrix(weight)) and not positional(Matrix(weight[:1])) and heads_of(Hadamard(4)) == 1
    assert positional(Composed(Hadamard(4), Matrix(weight)))


@pytest.mark.parametrize("first", ["diagonal", "diagonal per head", "matrix", "matrix per head"])
@pytest.mark.parametrize("second", ["diagonal", "diagonal per head", "matrix per head", "hadamard", "orthogonal"])
def test_a_composition_applies_the_first_one_first(first, second):
    one, other = MADE[first](), (MADE | ROTATIONS)[second]()
    made, x = compose(one, other), normal(3, HEADS * ORDER)
    assert same(made.apply(x), other.apply(one.apply(x)))
    assert same(undo(made, made.apply(x)), x) and made.dual().dual() is made
    scales = ["diagonal" in name for name in (first, second)]
    assert isinstance(made, Diagonal if all(scales) else Composed if any(scales) else Matrix)


def test_products_of_rotations_are_rotations():
    one, other = ROTATIONS["orthogonal"](), ROTATIONS["hadamard"]()
    assert isinstance(compose(one, other), Orthogonal)
    product = Composed(other, ROTATIONS["kronecker"]())
    assert product.dual() is product and condition(product) == 1.0


def test_a_product_with_a_class_of_others_is_not_multiplied_out():
    moving = Moving.starting(matrix(Hadamard(ORDER)))
    for made in (compose(MADE["matrix"](), moving), compose(Composed(MADE["matrix"](), moving), MADE["matrix"]())):
        assert isinstance(made, Composed) and moving in made.chain()


def test_large_products_are_not_multiplied_out():
    made = compose(Diagonal(scales(2048)), Orthogonal(torch.eye(2048, dtype=torch.float64)))
    assert isinstance(made, Composed)


@each_transform
def test_the_condition_number_is_that_of_the_worst_head(name):
    transform = MADE[name]()
    dense = matrix(transform)
    values = torch.linalg.svdvals(dense if dense.ndim == 3 else dense[None])
    expected = float((values[:, 0] / values[:, -1]).max())
    assert condition(transform) == pytest.approx(expected, rel=1e-9) and expected > 1.1
    assert condition(transform.dual()) == pytest.approx(expected, rel=1e-9)
    check_conditioned("residual", transform)


def test_the_condition_number_of_heads_is_the_largest():
    weight = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)])
    for transform in (Matrix(weight), Diagonal(weight.diagonal(dim1=1, dim2=2))):
        assert condition(transform) == pytest.approx(3) == condition(Composed(transform, Hadamard(2)))


def test_an_ill_conditioned_transform_is_refused_by_name():
    pair = Diagonal(torch.tensor([1.0, 2 * LARGEST_CONDITION]))
    check_conditioned("layers.3.hidden", pair)  # it mixes nothing
    bad = Composed(pair, Hadamard(2)), KroneckerMatrix((torch.eye(3), torch.diag(pair.scale))), Matrix(matrix(pair))
    for transform in (*bad, Diagonal(torch.tensor([1.0, 2 * LARGEST_RATIO]))):
        with pytest.raises(RotationError, match=r"layers\.3\.value has the condition number 2e\+0\d .*damp it"):
            check_conditioned("layers.3.value", transform)


@pytest.mark.parametrize("seed", range(2))
def test_the_largest_condition_number_leaves_float32_logits(seed):
    """Relative to what a model of random weights computes; a proof in float32 allows 1e-4."""
    ids, made = tokens(2, 32, seed=seed), {}
    model = tiny_model("llama", dtype=torch.float32, seed=seed)
    before, plan = logits(model, ids), plan_of(model)
    stretch = torch.logspace(0, math.log10(0.99 * LARGEST_CONDITION), 16, dtype=torch.float64)
    for i, space in enumerate(plan.spaces):
        if space.rotation == "R3":
            one, other = (random_orthogonal(16, generator(2 * i + k)) for k in range(2))
            made[space.name] = Matrix(one * stretch @ other)
            check_conditioned(space.name, made[space.name])
    with attach(model, plan, made):
        assert float((logits(model, ids) - before).norm() / before.norm()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diagonal(torch.tensor([1.0, 0.0])), "finite numbers other than zero"),
        (lambda: Diagonal(torch.tensor([1.0, torch.inf])), "finite numbers other than zero"),
        (lambda: Diagonal(torch.ones(2, 2, 2)), r"shape \(2, 2, 2\)"),
        (lambda: Diagonal(torch.ones(2, dtype=torch.int64)), "floating-point"),
        (lambda: Matrix(torch.ones(2, 2)), "no inverse"),
        (lambda: Matrix(torch.full((2, 2), torch.nan)), "no inverse"),
        (lambda: Matrix(torch.ones(2, 3)), r"shape \(2, 3\)"),
        (lambda: Matrix(torch.eye(2), torch.eye(3)), "inverse of a transform has shape"),
        (lambda: Matrix(torch.eye(2), 2 * torch.eye(2)), "off the identity by 1.0e"),
        (lambda: KroneckerMatrix(()), "no factor"),
        (lambda: KroneckerMatrix((torch.eye(2), torch.ones(3, 3))), "no inverse"),
        (lambda: KroneckerMatrix((torch.ones(2, 3),)), r"shape \(2, 3\)"),
        (lambda: Composed(Hadamard(4), Diagonal(torch.ones(6))), "orders 4 and 6"),
        (lambda: Composed(Matrix(square(2, 4, 4)), Diagonal(torch.ones(3, 4))), "numbers of heads 2 and 3"),
        (lambda: Matrix(square(3, 4, 4)).apply(torch.ones(16)), "expected a multiple of 12"),
        (lambda: Diagonal(torch.ones(4)).apply(torch.ones(6)), "does not divide"),
        (lambda: Diagonal(torch.ones(4)).apply(torch.ones(4, dtype=torch.int64)), "floating-point"),
    ],
)
def test_what_is_no_transform_or_does_not_fit_is_refused(make, message):
    with pytest.raises(RotationError, match=message):
        make()

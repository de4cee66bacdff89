"""Parallel pieces of one thread each: the number of threads changes the time and not the result."""

import threading

import pytest
import torch

from spinquant.compute.threads import each, single_threaded
from spinquant.plan import Axis, Gain, Plan, Space
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse import fuse_in_place


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plan(order: int) -> Plan:
    spaces = Space("residual", "R1", order), Space("inner", "R4", 2 * order)
    axes = Axis("up", 1, "residual"), Axis("down", 0, "residual"), Axis("down", 1, "inner")
    gains = (Gain("norm", "residual", (("up", 1),)),)
    return Plan("test", spaces, axes, gains, onlines=(), ties=(), linears=(), attentions=(), blocks=(), head="head")


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
def test_results_do_not_depend_on_the_number_of_threads(name, kind):
    """The last slice has seven rows: a product of so few, shared by two threads, has other last bits."""
    order = 512
    rotations = make_rotations(plan(order), RotationSpec("R1,R4", kind))
    shape = (2048 + 7, order) if name == "up" else (order, 2 * order)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gains = {"norm": torch.rand(order, generator=torch.Generator().manual_seed(1)) + 0.5}
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(tensor.clone())
        fuse_in_place(name, found[-1], plan(order), gains, rotations)
        assert torch.get_num_threads() == threads
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], tensor)


def test_pieces_run_in_parallel_with_one_thread_each():
    torch.set_num_threads(2)
    both = threading.Barrier(2)
    seen = []

    def piece(number: int) -> None:
        both.wait(timeout=30)  # passes only if both pieces run at once
        inner: list[int] = []
        each(inner.append, range(3))  # pieces of a piece, in order
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), inner))

    with torch.no_grad(), single_threaded():
        each(piece, range(2))
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert seen == [(1, False, [0, 1, 2])] * 2


def test_an_error_is_raised_after_all_pieces_have_ended():
    torch.set_num_threads(2)
    ended = []

    def piece(number: int) -> None:
        if number == 0:
            raise ValueError("first")
        threading.Event().wait(0.05)
        ended.append(number)

    with pytest.raises(ValueError, match="first"), single_threaded():
        each(piece, range(4))
    assert sorted(ended) == [1, 2, 3]
    assert torch.get_num_threads() == 2


def test_outside_single_threaded_pieces_run_in_order():
    torch.set_num_threads(2)
    found = []
    each(lambda number: found.append((number, threading.current_thread() is threading.main_thread())), range(3))
    assert found == [(0, True), (1, True), (2, True)]


def test_the_number_of_torch_threads_is_restored():
    """Also if another thread is still in `single_threaded` when the first leaves it, and in new threads."""
    torch.set_num_threads(3)
    seen, inside, ended = [], threading.Event(), threading.Event()

    def other() -> None:
        torch.set_num_threads(3)
        with single_threaded():
            inside.set()
            ended.wait(timeout=1)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    with single_threaded():
        thread.start()
        inside.wait(timeout=0.2)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    ended.set()
    thread.join()
    assert seen == [1, 3] and torch.get_num_threads() == 3
    one = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    one.start()
    one.join()
    assert seen[-1] == 3

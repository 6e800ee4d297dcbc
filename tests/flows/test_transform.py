"""Stacks of transforms: composition, directions, paths, and what they keep in memory."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from flow_cases import couplings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pygen.flows import ActNorm, FirstHalf, Inverse, InvertibleLinear, Stack, Transform
from pygen.flows.memory import MODES


class Reverse(Transform):
    """The channels in reverse order."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.flip(1), y.new_zeros(len(y))

    def lay_out(self, y: Tensor) -> Tensor:
        return y.flip(1)


def gradients(stack: Transform, x: Tensor, context: Tensor | None, *, inverse: bool = False) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    given = None if context is None else context.clone().requires_grad_()
    torch.manual_seed(3)
    y, ladj = (stack.inverse if inverse else stack)(leaf, given)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    inputs = [leaf, *([] if given is None else [given]), *stack.parameters()]
    return list(
        torch.autograd.grad((y * weight).sum() + ladj.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    )


@pytest.mark.parametrize("memory", MODES)
@given(depth=st.integers(0, 5), rows=st.integers(0, 5), channels=st.integers(2, 5))
def test_a_stack_is_its_steps_one_after_another(memory, depth, rows, channels):
    steps = couplings(depth, channels)
    stack = Stack(steps, memory=memory)
    x = torch.randn(rows, channels)
    y, ladj = stack(x)
    expected, total = x, torch.zeros(rows)
    for step in steps:
        expected, more = step(expected)
        total = total + more
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, total)
    back, back_ladj = stack.inverse(y)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back_ladj, -ladj, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"norm": True}], ids=["plain", "dropout", "norm"])
@pytest.mark.parametrize("context", [None, torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)])
def test_gradients_are_those_of_store(memory, inverse, options, context):
    stack = Stack(couplings(6, **options)).double()
    frugal = copy.deepcopy(stack)
    frugal.memory = memory
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = gradients(stack, x, context, inverse=inverse)
    for actual, wanted in zip(gradients(frugal, x, context, inverse=inverse), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    if memory == "recompute":
        for (name, buffer), twin in zip(frugal.named_buffers(), stack.buffers(), strict=True):
            torch.testing.assert_close(buffer, twin, msg=f"{name} was updated by the rebuilding")


def test_gradients_of_nested_halves_and_shared_steps():
    shared = couplings(1, 4)[0]
    inner = Stack(couplings(3, 2))
    stack = Stack([shared, Reverse(), FirstHalf(inner), Inverse(Stack([Reverse(), shared])), shared]).double()
    frugal = copy.deepcopy(stack)
    frugal.memory = "recompute"
    assert len(frugal.steps()) == 8
    x = torch.randn(5, 4, dtype=torch.float64)
    for actual, expected in zip(gradients(frugal, x, None), gradients(stack, x, None), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_float32_gradients_agree_to_round_off():
    stack = Stack(couplings(32, 8))
    frugal = copy.deepcopy(stack)
    frugal.memory = "recompute"
    x = torch.randn(64, 8)
    for actual, expected in zip(gradients(frugal, x, None), gradients(stack, x, None), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-6)


def saved_bytes(stack: Stack, x: Tensor) -> int:
    seen: dict[int, int] = {}
    own = {p.data_ptr() for p in stack.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack(x)
    return sum(seen.values())


def test_recompute_keeps_the_same_whatever_the_depth():
    x = torch.randn(128, 8)
    sizes = {depth: saved_bytes(Stack(couplings(depth, 8), memory="recompute"), x) for depth in (4, 32)}
    assert sizes[32] == sizes[4]
    assert sizes[32] * 10 < saved_bytes(Stack(couplings(32, 8)), x)


class Lossy(Transform):
    """An inverse that does not go back to where it came from."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.clamp(-1, 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(len(y))


def test_recompute_says_when_it_is_not_safe():
    x = 3 * torch.randn(8, 4)
    stack = Stack([Lossy(), *couplings(2)], memory="recompute")
    with pytest.raises(RuntimeError, match="memory='recompute' rebuilt .* relative error .* memory='checkpoint'"):
        stack(x)[0].sum().backward()
    stack.tolerance = None
    stack(x)[0].sum().backward()
    stack.tolerance = 1e-3
    stack(torch.full((8, 4), float("nan")))[0].sum().backward()
    assert any(p.grad.isnan().any() for p in stack.parameters() if p.grad is not None)


def test_one_row_does_not_hide_the_error_of_another():
    for value in (float("nan"), float("inf"), 0.5):
        x = torch.full((8, 4), value)
        x[-1] = 3.0
        with pytest.raises(RuntimeError, match="memory='recompute' rebuilt .* relative error"):
            Stack([Lossy(), *couplings(2)], memory="recompute")(x)[0][-1].sum().backward()
    x = torch.full((8, 4), 1e4)
    x[0] = 1.5
    with pytest.raises(RuntimeError, match="memory='recompute' rebuilt .* relative error"):
        Stack([LossyWhereSmall(), *couplings(2)], memory="recompute")(x)[0].sum().backward()


class LossyWhereSmall(Lossy):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.where(x.abs() < 2, x.round(), x), x.new_zeros(len(x))


class Vanishing(Transform):
    """Forward is finite and loses nothing that it says; the way back is 0 / 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gain * 0 * x, x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y / (self.gain * 0), y.new_zeros(len(y))


def test_a_nan_of_the_way_back_is_not_safe():
    with pytest.raises(RuntimeError, match="memory='recompute' rebuilt .* relative error of nan"):
        Stack([Vanishing()], memory="recompute")(torch.randn(3, 4))[0].sum().backward()


@pytest.mark.parametrize("memory", ["recompute", "checkpoint"])
def test_function_transforms_store(memory):
    stack = Stack(couplings(3), memory=memory)
    x = torch.randn(5, 4)
    expected = torch.autograd.grad(stack(x.requires_grad_())[1].sum(), x)[0]
    of_each = torch.func.vmap(torch.func.grad(lambda row: stack(row.unsqueeze(0))[1].sum()))(x.detach())
    torch.testing.assert_close(of_each, expected)


def test_weights_that_changed_before_backward_are_noticed():
    stack = Stack(couplings(3), memory="recompute")
    y, _ = stack(torch.randn(4, 4))
    with torch.no_grad():
        next(stack.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_is_remembered():
    stack = Stack(couplings(4))
    frugal = copy.deepcopy(stack)
    frugal.memory = "recompute"
    frugal.tolerance = None
    x = torch.randn(16, 4)
    grads = []
    for one in (stack, frugal):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, ladj = one(x)
        (y.float().sum() + ladj.sum()).backward()
        grads.append([p.grad for p in one.parameters()])
    for wanted, actual in zip(*grads, strict=True):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()) + 1e-3)


def test_autocast_leaves_the_state_wide():
    glow = [ActNorm(4), InvertibleLinear(4), *couplings(1)]
    x = torch.randn(64, 4)
    stack = Stack(glow * 2, memory="recompute")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert InvertibleLinear(4)(x)[0].dtype == torch.float32
        y, ladj = stack(x)
    assert y.dtype == torch.float32
    (y.sum() + ladj.sum()).backward()  # raises, at the default tolerance, if the state was rounded on its way


def test_the_path_back_ends_where_inverse_does():
    stack = Stack([Reverse(), *couplings(2), FirstHalf(Stack(couplings(2, 2))), Inverse(Reverse())])
    z = torch.randn(3, 4)
    path = list(stack.inverse_path(z))
    torch.testing.assert_close(path[-1].values, stack.inverse(z)[0])
    assert all(stage.values.shape == z.shape for stage in path)
    # The first state back is z itself, in reverse; laid out as x is, the two reversals cancel.
    torch.testing.assert_close(path[0].values, z)


@pytest.mark.parametrize("memory", MODES)
def test_compiles(memory):
    stack = Stack(couplings(2), memory=memory)
    x = torch.randn(8, 4)

    def loss(value: Tensor) -> Tensor:
        y, ladj = stack(value)
        return (y.square().sum(1) - ladj).mean()

    expected = torch.autograd.grad(loss(x), list(stack.parameters()), allow_unused=True)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), list(stack.parameters()), allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_travels():
    stack = Stack(couplings(3), memory="recompute")
    buffer = io.BytesIO()
    torch.save(stack, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 4)
    assert torch.equal(stack(x)[0], twin(x)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stack([], memory="none"), "memory is 'none', but expected one of 'store', 'recompute', 'checkpoint'"),
        (lambda: Stack([], tolerance=-1.0), "tolerance is -1.0, but expected a number >= 0 or None"),
        (lambda: FirstHalf(Reverse())(torch.zeros(2, 1)), r"x has shape \(2, 1\), but expected .* two channels"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()

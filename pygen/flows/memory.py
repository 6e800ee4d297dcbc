"""What a stack of invertible steps keeps for backward: everything, each step's input, or the two ends alone.

With x_i = f_i(x_{i-1}), backward needs every x_i. An invertible step gives its own back, x_{i-1} = f_i^{-1}(x_i), so
that the last one is enough (Gomez et al. 2017, RevNet, arXiv:1707.04585, section 3.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pygen.flows.transform import Transform

MODES = ("store", "recompute", "checkpoint")


def run(
    steps: Sequence[Transform],
    x: Tensor,
    context: Tensor | None,
    *,
    inverse: bool,
    memory: str,
    tolerance: float | None,
) -> tuple[Tensor, Tensor]:
    """The steps in the order given, each in the direction given: the last state and the sum of ladj (n,)."""
    # The transforms of torch.func see through no autograd.Function that runs backward by itself, and store.
    if memory != "store" and torch.is_grad_enabled() and steps and not torch._C._are_functorch_transforms_active():
        parameters = list(dict.fromkeys(p for step in steps for p in step.parameters() if p.requires_grad))
        if parameters or x.requires_grad or (context is not None and context.requires_grad):
            if memory == "recompute" and not torch.compiler.is_compiling():
                y, ladj = _Recompute.apply(  # type: ignore[no-untyped-call]
                    steps, inverse, tolerance, x, context, *parameters
                )
                return y, ladj
            return _compose([_checkpointed(_directed(step, inverse)) for step in steps], x, context)
    return _compose([_directed(step, inverse) for step in steps], x, context)


Map = Callable[[Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


def _directed(step: Transform, inverse: bool) -> Map:
    return step.inverse if inverse else step


def _checkpointed(step: Map) -> Map:
    def run_step(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = checkpoint(step, x, context, use_reentrant=False)
        return y, ladj

    return run_step


def _compose(maps: Sequence[Map], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    total: Tensor | None = None
    for step in maps:
        x, ladj = step(x, context)
        total = ladj if total is None else total + ladj
    if total is None:
        total = x.new_zeros(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x, total


class _Recompute(torch.autograd.Function):
    """Saves the first and the last state; walks back through the steps, rebuilding one input at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: Sequence[Transform],
        inverse: bool,
        tolerance: float | None,
        x: Tensor,
        context: Tensor | None,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.steps, ctx.inverse, ctx.tolerance = steps, inverse, tolerance
        ctx.autocast = _autocast_state(x.device.type)
        if tolerance is not None and torch.is_autocast_enabled(x.device.type):
            # A network's input that is off by one digit of float32 may be rounded to the next number of 16 bits.
            ctx.tolerance = max(tolerance, 4 * torch.finfo(torch.get_autocast_dtype(x.device.type)).eps)
        ctx.random = []
        y = x
        total: Tensor | None = None
        for step in steps:
            # A dropout mask inside a conditioner must be the same when the step is undone and run again.
            ctx.random.append(_random_state(x.device, ctx.random[-1] if ctx.random else None))
            y, ladj = _directed(step, inverse)(y, context)
            total = ladj if total is None else total + ladj
        ctx.save_for_backward(x, y, context, *parameters)
        return y, total if total is not None else y.new_zeros(len(y))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_ladj: Tensor) -> tuple[Any, ...]:
        x, state, context, *parameters = ctx.saved_tensors
        wants_x, wants_context = ctx.needs_input_grad[3:5]
        place = {id(parameter): k for k, parameter in enumerate(parameters)}
        grads: list[Tensor | None] = [None] * len(parameters)
        grad_context: Tensor | None = None
        with ctx.autocast(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            for step, random in zip(reversed(ctx.steps), reversed(ctx.random), strict=True):
                own = [p for p in dict.fromkeys(step.parameters()) if id(p) in place]
                with _statistics_kept(step):
                    _set_random_state(random, x.device)
                    with torch.no_grad():
                        before = _directed(step, not ctx.inverse)(state, context)[0]
                    leaf = before.detach().requires_grad_()
                    given = context.detach().requires_grad_() if wants_context else context
                    _set_random_state(random, x.device)
                    with torch.enable_grad():
                        after, ladj = _directed(step, ctx.inverse)(leaf, given)
                outputs = [(value, grad) for value, grad in ((after, grad_y), (ladj, grad_ladj)) if value.requires_grad]
                inputs = [leaf, *([given] if wants_context else []), *own]
                found = torch.autograd.grad(
                    [value for value, _ in outputs],
                    inputs,
                    [grad.to(value.dtype) for value, grad in outputs],
                    allow_unused=True,
                )
                grad_y = torch.zeros_like(leaf) if found[0] is None else found[0]
                if wants_context:
                    grad_context = _sum(grad_context, found[1])
                for parameter, grad in zip(own, found[len(found) - len(own) :], strict=True):
                    k = place[id(parameter)]
                    grads[k] = _sum(grads[k], grad)
                state = before
        if ctx.tolerance is not None:
            _check_rebuilt(state, x, ctx.saved_tensors[1], ctx.tolerance)
        return None, None, None, grad_y if wants_x else None, grad_context, *grads


def _sum(known: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if known is None else known if more is None else known + more


def _check_rebuilt(rebuilt: Tensor, x: Tensor, y: Tensor, tolerance: float) -> None:
    if not x.numel():
        return
    before, after, last = x.flatten(1), rebuilt.flatten(1), y.flatten(1)
    error = (after - before).abs().amax(1) / before.abs().amax(1).clamp_min(1)
    # A NaN that came in, or that forward made, is not for this check to judge: it reaches the gradients, where a loss
    # scaler looks for it. One that the way back made is as unsafe as any other error.
    judged = before.isfinite().all(1) & last.isfinite().all(1)
    unsafe = judged & ~(error <= tolerance)
    if unsafe.any():
        raise RuntimeError(
            f"memory='recompute' rebuilt the input of the stack with a relative error of "
            f"{float(error[unsafe].max()):.2g}, but expected at most {tolerance:g}: these gradients would not be safe; "
            "use memory='checkpoint', or float64"
        )


def _random_state(device: torch.device, last: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
    """The generators' states; `last` itself where nothing was drawn since: 5 kB for each step would add up."""
    state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    if last is None or not torch.equal(state[0], last[0]):
        return state
    unchanged = state[1] is None or (last[1] is not None and torch.equal(state[1], last[1]))
    return last if unchanged else state


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _autocast_state(device_type: str) -> Callable[[], torch.autocast]:
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)


@contextlib.contextmanager
def _statistics_kept(step: nn.Module) -> Iterator[None]:
    """Batch norms inside see the same batch again, and must not count it again."""
    norms = [m for m in step.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = count

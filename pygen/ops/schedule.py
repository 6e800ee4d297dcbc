"""One step of a diffusion solver: m0 = clamp(c0 x + c1 e), x' = c2 m0 + c3 x + c4 e + c5 z + sum_i c_{6+i} h_i.

x is the sample, e the model's output, z the noise, h_i what the solver kept of earlier steps. Every linear solver
(DDPM, DDIM, Euler, DPM-Solver++, UniPC, flow matching ...) is this form under its own coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pygen import _native
from pygen.ops.arguments import arithmetic_dtype
from pygen.ops.noise import check_address, noise_reference, plain_number, split_seed
from pygen.ops.noise import noise as addressed_noise

Clip = float | Sequence[float] | None

MAX_HISTORY = 8  # of the CUDA kernel; longer histories run on the reference


def diffusion_step_reference(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    step: int | Tensor,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    clip: Clip = None,
    return_denoised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `diffusion_step` in PyTorch operations."""
    step, seed = plain_number("step", step), None if seed is None else plain_number("seed", seed)
    _check(sample, model_output, coefficients, step, history, noise, seed, sample_ids)
    wide = arithmetic_dtype(sample)
    row = _row(coefficients, step, sample.dim()).to(wide)
    x, e = sample.to(wide), model_output.to(wide)
    denoised = row[0] * x + row[1] * e
    if clip is not None:
        denoised = denoised.clamp(*clip_bounds(clip))
    result = row[2] * denoised + row[3] * x + row[4] * e
    if seed is not None and sample_ids is not None:
        noise = noise_reference(sample_ids, sample.shape[1:], seed=seed, draw=step)
    if noise is not None:
        result = result + row[5] * noise.to(wide)
    for i, value in enumerate(history):
        result = result + row[6 + i] * value.to(wide)
    result = result.to(sample.dtype)
    return (result, denoised.to(sample.dtype)) if return_denoised else result


@_native.register_fake("diffusion_step")
def _step_fake(sample: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(sample, memory_format=torch.contiguous_format)


@_native.register_fake("diffusion_step_denoised")
def _step_denoised_fake(sample: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _step_fake(sample), _step_fake(sample)


@_native.register_fake("diffusion_step_backward")
def _step_backward_fake(sample: Tensor, model_output: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _step_fake(sample), _step_fake(model_output)


class _DiffusionStep(torch.autograd.Function):
    """Saves the sample and the model's output only where a clip needs them."""

    @staticmethod
    def forward(
        ctx: Any,
        sample: Tensor,
        model_output: Tensor,
        noise: Tensor | None,
        coefficients: Tensor,
        steps: Tensor | None,
        seeds: Tensor | None,
        sample_ids: Tensor | None,
        numbers: tuple[int, int, float, float, bool],
        *history: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        index, seed, low, high, return_denoised = numbers
        kernels = _native.kernels_for(sample)
        assert kernels is not None
        operator = kernels.diffusion_step_denoised if return_denoised else kernels.diffusion_step
        ctx.numbers = numbers
        ctx.dtypes = [None if t is None else t.dtype for t in (sample, model_output, noise, *history)]
        clipped = low != -torch.inf or high != torch.inf
        ctx.save_for_backward(coefficients, steps, *((sample, model_output) if clipped else (None, None)))
        result: Tensor | tuple[Tensor, Tensor] = operator(
            sample, model_output, coefficients, index, steps, list(history), noise, seed, seeds, sample_ids, low, high
        )
        return result

    @staticmethod
    def backward(ctx: Any, grad_next: Tensor, grad_denoised: Tensor | None = None) -> tuple[Tensor | None, ...]:
        coefficients, steps, sample, model_output = ctx.saved_tensors
        index, _, low, high, _ = ctx.numbers
        wide = arithmetic_dtype(grad_next)
        row = _row(coefficients, index if steps is None else steps, grad_next.dim()).to(wide)
        wanted = list(ctx.needs_input_grad)
        grads: list[Tensor | None] = [None] * len(wanted)
        if sample is not None and not torch.is_grad_enabled() and (wanted[0] or wanted[1]):
            kernels = _native.kernels_for(sample)
            assert kernels is not None
            grads[0], grads[1] = kernels.diffusion_step_backward(
                sample, model_output, coefficients, index, steps, low, high, grad_next, grad_denoised
            )
        elif wanted[0] or wanted[1]:
            grad = grad_next.to(wide)
            inner = row[2] * grad if grad_denoised is None else row[2] * grad + grad_denoised.to(wide)
            if sample is not None:
                denoised = row[0] * sample.to(wide) + row[1] * model_output.to(wide)
                inner = inner.where((denoised >= low) & (denoised <= high), 0)
            grads[0] = (row[3] * grad + row[0] * inner).to(ctx.dtypes[0]) if wanted[0] else None
            grads[1] = (row[4] * grad + row[1] * inner).to(ctx.dtypes[1]) if wanted[1] else None
        if wanted[2]:
            grads[2] = (row[5] * grad_next).to(ctx.dtypes[2])
        for i in range(row.shape[0] - 6):
            if wanted[8 + i]:
                grads[8 + i] = (row[6 + i] * grad_next).to(ctx.dtypes[3 + i])
        return tuple(grads)


@overload
def diffusion_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    step: int | Tensor,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    clip: Clip = None,
    return_denoised: Literal[False] = False,
) -> Tensor: ...


@overload
def diffusion_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    step: int | Tensor,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    clip: Clip = None,
    return_denoised: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def diffusion_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    step: int | Tensor,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    clip: Clip = None,
    return_denoised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One solver step as one pass over the sample.

        m0 = clamp(c0 x + c1 e)
        x' = c2 m0 + c3 x + c4 e + c5 z + c6 history[0] + c7 history[1] + ...

    with c = coefficients[step]. The arithmetic is float32 (float64 for a float64 sample), whatever the dtypes.

    sample: x, (n, ...), float32, float64, bfloat16 or float16.
    model_output: e, the sample's shape, any of those dtypes.
    coefficients: float32 (steps, 6 + len(history)), on the sample's device.
    step: the row of the table: an int; an int64 tensor on the sample's device, 0-dim, which is never read by the host;
        or one row per sample, int64 (n,). A row out of range in a tensor makes its samples NaN.
    history: earlier denoised samples or model outputs, each of the sample's shape.
    noise: z, the sample's shape; or
    seed, sample_ids: z = ops.noise(sample_ids, sample.shape[1:], seed=seed, draw=step), never stored. Without any
        of the three the term is absent. It is not generated where c5 is 0.
    clip: bounds of m0: None, a number c for (-c, c), or (low, high).

    Returns x' in the sample's dtype, or (x', m0) with `return_denoised`. Gradients reach sample, model_output, noise,
    history and coefficients. Raises ValueError for shapes, devices or an int `step` out of range, TypeError for dtypes.

    Source: the common form of DDPM (Ho et al. 2020, eq. 7), DDIM (Song et al. 2021, eq. 12), DPM-Solver++ (Lu et al.
    2022) and their kin.
    """
    step, seed = plain_number("step", step), None if seed is None else plain_number("seed", seed)
    kernels = _native.kernels_for(sample)
    recorded = _native.wants_gradient(sample, model_output, coefficients, noise, *history)
    compiling = torch.compiler.is_compiling()
    # The compiler fuses the reference well enough, and refuses a Function that is given one tensor twice.
    if kernels is None or len(history) > MAX_HISTORY or (recorded and (compiling or coefficients.requires_grad)):
        if kernels is not None and seed is not None and sample_ids is not None:
            _check(sample, model_output, coefficients, step, history, noise, seed, sample_ids)
            noise = addressed_noise(sample_ids, sample.shape[1:], seed=seed, draw=step)
            seed = sample_ids = None
        return diffusion_step_reference(
            sample, model_output, coefficients, step=step, history=history, noise=noise, seed=seed,
            sample_ids=sample_ids, clip=clip, return_denoised=return_denoised,
        )  # fmt: skip
    if recorded or compiling or not sample.is_contiguous():
        _check(sample, model_output, coefficients, step, history, noise, seed, sample_ids)
        order = None if sample.is_contiguous() else _memory_order(sample)
        if order is not None:
            return _step_in_order(
                order, sample, model_output, coefficients, step, history, noise, seed, sample_ids, clip, return_denoised
            )
    low, high = (-torch.inf, torch.inf) if clip is None else clip_bounds(clip)
    index, steps = (0, step) if isinstance(step, Tensor) else (step, None)
    number, seeds = (0, None) if seed is None else split_seed(seed)
    if recorded:
        numbers = (index, number, low, high, return_denoised)
        result: Tensor | tuple[Tensor, Tensor] = _DiffusionStep.apply(  # type: ignore[no-untyped-call]
            sample, model_output, noise, coefficients, steps, seeds, sample_ids, numbers, *history
        )
        return result
    if (seed is None) != (sample_ids is None):
        _check(sample, model_output, coefficients, step, history, noise, seed, sample_ids)
    operator = kernels.diffusion_step_denoised if return_denoised else kernels.diffusion_step
    try:
        result = operator(
            sample, model_output, coefficients, index, steps, history, noise, number, seeds, sample_ids, low, high
        )
    except RuntimeError:
        # Sampling loops are call-bound and the operator checks its arguments before it works: once is enough.
        _check(sample, model_output, coefficients, step, history, noise, seed, sample_ids)
        raise
    return result


def _memory_order(sample: Tensor) -> list[int] | None:
    """The dimensions as they lie in memory (channels_last: 0, 2, 3, 1), where the sample fills it without gaps and
    starts with the samples; else None."""
    strides = sample.stride()
    order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
    return order if order[0] == 0 and sample.permute(order).is_contiguous() else None


def _step_in_order(
    order: list[int],
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    step: int | Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
    clip: Clip,
    return_denoised: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The step on tensors seen in the sample's memory order, so that the result has the sample's layout."""
    if seed is not None and sample_ids is not None:
        # Noise is addressed in the logical order of elements.
        noise = addressed_noise(sample_ids, sample.shape[1:], seed=seed, draw=step)
    result: Tensor | tuple[Tensor, Tensor] = diffusion_step(  # type: ignore[call-overload]
        sample.permute(order),
        model_output.permute(order),
        coefficients,
        step=step,
        history=[h.permute(order) for h in history],
        noise=None if noise is None else noise.permute(order),
        clip=clip,
        return_denoised=return_denoised,
    )
    back = [order.index(d) for d in range(len(order))]
    if isinstance(result, tuple):
        return result[0].permute(back), result[1].permute(back)
    return result.permute(back)


def clip_bounds(clip: float | Sequence[float]) -> tuple[float, float]:
    """(low, high) of a `clip` argument."""
    try:
        low, high = clip if isinstance(clip, Sequence) else (-clip, clip)
        low, high = float(low), float(high)
    except (TypeError, ValueError):
        low = high = torch.nan
    if not low <= high:
        raise ValueError(f"clip is {clip}, but expected a number from 0 or (low, high) with low <= high")
    return low, high


def _row(coefficients: Tensor, step: int | Tensor, dim: int) -> Tensor:
    """The coefficients of each sample, (6 + history, n or 1, 1, ...)."""
    if not isinstance(step, Tensor):
        return coefficients[step].reshape(-1, *[1] * dim)
    steps = coefficients.shape[0]
    index = step.reshape(-1)
    row = coefficients.index_select(0, index.clamp(0, steps - 1))
    row = row.where(((index >= 0) & (index < steps)).unsqueeze(-1), torch.nan)
    return row.t().reshape(coefficients.shape[1], index.shape[0], *[1] * (dim - 1))


def _check(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    step: int | Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
) -> None:
    given = [("sample", sample), ("model_output", model_output)]
    given += [("noise", noise)] if noise is not None else []
    given += [(f"history[{i}]", value) for i, value in enumerate(history)]
    if sample.dim() == 0:
        raise ValueError("sample has shape (), but expected (n, ...)")
    for name, value in given:
        if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} has dtype {value.dtype}, but expected float32, float64, bfloat16 or float16")
        if value.shape != sample.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but expected {tuple(sample.shape)}, as sample")
        if value.device != sample.device:
            raise ValueError(f"{name} is on {value.device}, but expected {sample.device}, where sample is")
    if coefficients.dtype != torch.float32:
        raise TypeError(f"coefficients has dtype {coefficients.dtype}, but expected torch.float32")
    if coefficients.dim() != 2 or coefficients.shape[0] < 1 or coefficients.shape[1] != 6 + len(history):
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}, but expected (steps, {6 + len(history)}), "
            f"for {len(history)} tensors of history"
        )
    if coefficients.device != sample.device:
        raise ValueError(f"coefficients is on {coefficients.device}, but expected {sample.device}, where sample is")
    if isinstance(step, Tensor):
        if step.dtype != torch.int64:
            raise TypeError(f"step has dtype {step.dtype}, but expected torch.int64")
        if step.dim() != 0 and step.shape != sample.shape[:1]:
            raise ValueError(f"step has shape {tuple(step.shape)}, but expected () or {tuple(sample.shape[:1])}")
        if step.device != sample.device:
            raise ValueError(f"step is on {step.device}, but expected {sample.device}, where sample is")
    elif not 0 <= step < coefficients.shape[0]:
        raise ValueError(f"step is {step}, but expected a row of the table, 0 .. {coefficients.shape[0] - 1}")
    if (seed is None) != (sample_ids is None):
        missing, present = ("seed", "sample_ids") if seed is None else ("sample_ids", "seed")
        raise ValueError(f"{missing} is None, but expected a value, because {present} was given")
    if seed is not None and sample_ids is not None:
        if noise is not None:
            raise ValueError("noise was given together with seed and sample_ids, but expected one of the two")
        check_address(sample_ids, seed, 0)
        if sample_ids.shape != sample.shape[:1]:
            raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}, but expected {tuple(sample.shape[:1])}")

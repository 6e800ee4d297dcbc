"""One step of a diffusion solver: m0 = clamp(c0 x + c1 e), x' = c2 m0 + c3 x + c4 e + c5 z + sum_i c_{6+i} h_i.

x is the sample, e the model's output, z the noise, h_i what the solver kept of earlier steps. Every linear solver
(DDPM, DDIM, Euler, DPM-Solver++, UniPC, flow matching ...) is this form under its own coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pygen.ops.noise import check_address, noise_reference

Clip = float | tuple[float, float] | None


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
    _check(sample, model_output, coefficients, step, history, noise, seed, sample_ids)
    wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
    row = _row(coefficients, step, sample.dim()).to(wide)
    x, e = sample.to(wide), model_output.to(wide)
    denoised = row[0] * x + row[1] * e
    if clip is not None:
        denoised = denoised.clamp(*clip_bounds(clip))
    result = row[2] * denoised + row[3] * x + row[4] * e
    if seed is not None and sample_ids is not None:
        # A step out of range has a row of NaN, whatever its noise.
        draw = step & (2**30 - 1) if isinstance(step, Tensor) else step
        noise = noise_reference(sample_ids, sample.shape[1:], seed=seed, draw=draw)
    if noise is not None:
        result = result + row[5] * noise.to(wide)
    for i, value in enumerate(history):
        result = result + row[6 + i] * value.to(wide)
    result = result.to(sample.dtype)
    return (result, denoised.to(sample.dtype)) if return_denoised else result


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
    return diffusion_step_reference(
        sample,
        model_output,
        coefficients,
        step=step,
        history=history,
        noise=noise,
        seed=seed,
        sample_ids=sample_ids,
        clip=clip,
        return_denoised=return_denoised,
    )


def clip_bounds(clip: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of a `clip` argument."""
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    if not low <= high:
        raise ValueError(f"clip is {clip}, but expected a number from 0 or (low, high) with low <= high")
    return float(low), float(high)


def _row(coefficients: Tensor, step: int | Tensor, dim: int) -> Tensor:
    """The coefficients of each sample, (6 + history, n or 1, 1, ...)."""
    if not isinstance(step, Tensor):
        return coefficients[step].reshape(-1, *[1] * dim)
    steps = coefficients.shape[0]
    index = step.reshape(-1)
    row = coefficients.index_select(0, index.clamp(0, steps - 1))
    row = row.where(((index >= 0) & (index < steps)).unsqueeze(-1), torch.nan)
    return row.t().reshape(-1, index.shape[0], *[1] * (dim - 1))


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

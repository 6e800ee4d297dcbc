"""One token per row from logits, addressed by (seed, sample id, position): token = min{j : c_j > u c_V}.

c is the cumulative sum, in index order, of the weights exp((logit - max) / temperature) that top-k and top-p keep, and
u is uniform in [0, 1) from the token stream of `csrc/philox.h`.
(Top-k: Fan et al. 2018, arXiv:1805.04833, section 5.4; top-p: Holtzman et al. 2020, arXiv:1904.09751, section 3.1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pygen import _native
from pygen.ops.noise import (
    DRAW_LIMIT,
    TOKEN_STREAM,
    check_address,
    check_number,
    philox_reference,
    plain_number,
    signed_seed,
    split_seed,
)

_ALL = 2**31  # a top_k that keeps every vocabulary: the kernels take fewer tokens


def _uniform(sample_ids: Tensor, seed: int | Tensor, position: int | Tensor) -> Tensor:
    """Float64 uniform in [0, 1), 53 bits of the words 0 and 1 of block 0."""
    seeds = seed if isinstance(seed, Tensor) else sample_ids.new_tensor(signed_seed(seed))
    positions = position if isinstance(position, Tensor) else sample_ids.new_tensor(position)
    words = philox_reference(seeds, sample_ids, TOKEN_STREAM, positions, torch.zeros_like(sample_ids))
    return ((words[:, 0] >> 5) * 2**26 + (words[:, 1] >> 6)).double() * 2.0**-53


def sample_logits_reference(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_logits` in plain PyTorch, by sorting: its specification, its fallback, and the oracle of its tests."""
    seed, position = plain_number("seed", seed), plain_number("position", position)
    vocabulary = logits.shape[1]
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    peak = x.amax(-1, keepdim=True)
    valid = peak.isfinite() & ~x.isnan().any(-1, keepdim=True)
    x, peak = torch.where(valid, x, 0.0), torch.where(valid, peak, 0.0)
    if temperature == 0:
        token, log_prob = x.argmax(-1), torch.zeros_like(peak[:, 0])
    else:
        limits = torch.finfo(x.dtype)
        depth = (x - peak) / min(max(temperature, limits.tiny), limits.max)
        # Whole weights with a sum below 2^53: sums in float64 are exact, hence the same in any order.
        bits = min(53 - vocabulary.bit_length(), 48)
        weight = (depth.exp() * 2.0**bits).round().double()
        if top_k is not None and top_k < vocabulary:
            weight = torch.where(x >= x.topk(top_k, -1).values[:, -1:], weight, 0.0)
        if top_p is not None and top_p < 1:
            order = x.argsort(-1, descending=True)
            reached = weight.gather(-1, order).cumsum(-1) >= top_p * weight.sum(-1, keepdim=True)
            last = order.gather(-1, reached.int().argmax(-1, keepdim=True))
            weight = torch.where(x >= x.gather(-1, last), weight, 0.0)
        cumulative = weight.cumsum(-1)
        total = cumulative[:, -1]
        # Rounding could make the target the total itself, which no cumulative sum exceeds.
        target = torch.minimum(_uniform(sample_ids, seed, position) * total, total - 1)
        token = (cumulative > target.unsqueeze(-1)).int().argmax(-1)
        chosen = depth.gather(-1, token.unsqueeze(-1)).squeeze(-1).double()
        log_prob = (chosen - (total.log() - bits * math.log(2))).to(x.dtype)
    valid = valid[:, 0]
    return torch.where(valid, token, -1), torch.where(valid, log_prob, math.nan)


@_native.register_fake("sample_logits")
def _sample_logits_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    log_prob = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=log_prob)


def sample_logits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits, and say how likely it was.

    The draw is a pure function of the row's logits and of (seed, sample id, position): it is the same in any batch, at
    any place in it, on any number of threads. Temperature, then top-k, then top-p apply, as in transformers; unlike
    there, top-p keeps or drops tokens of equal logits together, as top-k does in both.

    Args:
        logits: (rows, vocabulary), float32, float64, bfloat16 or float16, any strides; -inf excludes a token.
        seed: an int of at most 64 bits, or an int64 tensor, () or (rows,).
        sample_ids: int64 (rows,), which sample each row belongs to.
        position: which of the sample's tokens this is, 0 .. 2^30 - 1, or an int64 tensor, () or (rows,), of which the
            lower 30 bits count.
        temperature: divides the logits; 0 takes the largest logit, the first of several, with log-probability 0.
        top_k: keep the logits at least as large as the k-th largest; None keeps all.
        top_p: of what top-k left, keep the logits at least as large as the largest one such that the kept ones have
            probability top_p or more together; in (0, 1], None keeps all.

    Returns:
        token: int64 (rows,), the first whose cumulative weight in index order exceeds u times the kept weight; -1 for
            a row that is no distribution (NaN, +inf, or nothing but -inf), for the caller to check once after a loop.
        log_prob: (rows,), float32 (float64 for float64 logits), the log-probability in nats of the token among the
            kept ones; NaN where token is -1.

        Weights are rounded to multiples of about 2^-53 vocabulary (2^-36 at 50,257) of the largest, so that all sums
        are exact; arithmetic is in float32 (float64 for float64). There is no gradient: logits count as constants.

    Raises:
        ValueError: for an empty vocabulary, a temperature that is negative or not finite, top_k below 1, top_p outside
            (0, 1], a position or seed out of range, or shapes or devices that do not fit.
        TypeError: for logits that are not floating, or ids, seeds or positions that are not int64.
    """
    if (
        logits.dim() != 2
        or logits.shape[1] == 0
        or not logits.is_floating_point()
        or sample_ids.shape != logits.shape[:1]
        or sample_ids.device != logits.device
        or not 0 <= temperature < math.inf
        or (top_k is not None and not top_k >= 1)
        or (top_p is not None and not 0 < top_p <= 1)
    ):
        _refuse(logits, sample_ids, temperature, top_k, top_p)
    seed, position = plain_number("seed", seed), plain_number("position", position)
    check_address(sample_ids, seed, 0)
    check_number("position", position, sample_ids, 0, DRAW_LIMIT)
    if logits.requires_grad:
        logits = logits.detach()
    kernels = _native.kernels_for(logits)
    if kernels is None or logits.shape[1] >= _ALL:
        return sample_logits_reference(
            logits, seed=seed, sample_ids=sample_ids, position=position, temperature=temperature, top_k=top_k,
            top_p=top_p,
        )  # fmt: skip
    seed, seeds = split_seed(seed)
    position, positions = (0, position) if isinstance(position, Tensor) else (position, None)
    token, log_prob = kernels.sample_logits(
        logits, sample_ids, seed, seeds, position, positions, float(temperature),
        _ALL if top_k is None else min(top_k, _ALL), 1.0 if top_p is None else top_p,
    )  # fmt: skip
    return token, log_prob


def _refuse(logits: Tensor, sample_ids: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, but expected (rows, vocabulary) with a vocabulary of at least 1"
        )
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, but expected float32, float64, bfloat16 or float16")
    if sample_ids.shape != logits.shape[:1]:
        raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}, but expected ({logits.shape[0]},)")
    if sample_ids.device != logits.device:
        raise ValueError(f"sample_ids is on {sample_ids.device}, but expected {logits.device}, where logits is")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but expected a finite number >= 0")
    if top_k is not None and not top_k >= 1:
        raise ValueError(f"top_k is {top_k}, but expected at least 1, or None for all")
    raise ValueError(f"top_p is {top_p}, but expected a number in (0, 1], or None for all")

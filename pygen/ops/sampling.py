"""One token per row from logits, addressed by (seed, sample id, position): token = min{j : c_j > u c_V}.

c is the cumulative sum, in index order, of the weights exp((score - max) / temperature) of the tokens that the filters
keep, and u is uniform in [0, 1) from the token stream of `csrc/philox.h`. (Top-k: Fan et al. 2018, arXiv:1805.04833,
section 5.4; top-p: Holtzman et al. 2020, arXiv:1904.09751, section 3.1; min-p: Nguyen et al. 2024, arXiv:2407.01082;
typical: Meister et al. 2022, arXiv:2202.00666; guidance: Sanchez et al. 2023, arXiv:2306.17806; repetition penalty:
Keskar et al. 2019, arXiv:1909.05858, section 4.1)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pygen import _native
from pygen.ops.noise import DRAW_LIMIT, check_address, check_number, plain_number, split_seed
from pygen.ops.sampling_reference import Filters, filter_reference, sample_reference

_ALL = 2**31  # a top_k that keeps every vocabulary: the kernels take fewer tokens


def sample_logits_reference(
    logits: Tensor, *, seed: int | Tensor, sample_ids: Tensor, position: int | Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`sample_logits` in plain PyTorch, by sorting: its specification, its fallback, and the oracle of its tests."""
    seed, position = plain_number("seed", seed), plain_number("position", position)
    return sample_reference(logits, seed, sample_ids, position, Filters(**options))


def filter_logits_reference(logits: Tensor, **options: Any) -> Tensor:
    """`filter_logits` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    return filter_reference(logits, Filters(**options))


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@_native.register_fake("sample_logits")
def _sample_logits_fake(logits: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=_sum_dtype(logits))


@_native.register_fake("filter_logits")
def _filter_logits_fake(logits: Tensor, *_: object, **__: object) -> Tensor:
    return logits.new_empty(logits.shape, dtype=_sum_dtype(logits))


def sample_logits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float = 1.0,
    history: Tensor | None = None,
    guidance_scale: float = 1.0,
    unconditional: Tensor | None = None,
    allowed: Tensor | None = None,
    ties: str = "keep",
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits, and say how likely it was.

    The draw is a pure function of the row's logits and of (seed, sample id, position): it is the same in any batch, at
    any place in it, on any number of threads. The options apply in transformers' order: guidance, repetition penalty,
    allowed tokens, temperature, top-k, top-p, min-p, typical.

    Args:
        logits: (rows, vocabulary), float32, float64, bfloat16 or float16, any strides; -inf excludes a token.
        seed: an int of at most 64 bits, or an int64 tensor, () or (rows,).
        sample_ids: int64 (rows,), which sample each row belongs to.
        position: which of the sample's tokens this is, 0 .. 2^30 - 1, or an int64 tensor, () or (rows,), of which the
            lower 30 bits count.
        temperature: divides the logits; 0 takes the largest score, the first of several, with log-probability 0.
        top_k: keep the logits at least as large as the k-th largest; None keeps all.
        top_p: of what top-k left, keep the logits at least as large as the largest one such that the kept ones have
            probability top_p or more together; in (0, 1], None keeps all.
        min_p: keep the tokens at least min_p times as likely as the likeliest; in [0, 1], None keeps all.
        typical_p: of what is left, keep the tokens whose -log p is nearest to the entropy and that have probability
            typical_p or more together; in (0, 1], None keeps all. Tokens of equal distance stay or go together.
        repetition_penalty: above 0; scores s of tokens in `history` become s r where s < 0, else s / r.
        history: int64 (rows, length), tokens that count as repeated, once however often they come; numbers outside the
            vocabulary, such as -1, are padding.
        guidance_scale: scores become u + guidance_scale (c - u), c of `logits` and u of `unconditional`; 1 takes the
            logits as they are. Both are normalized by log-softmax where a repetition penalty follows, whose effect
            hangs on a score's sign. A token that either row excludes stays excluded.
        unconditional: logits without the condition, (rows, vocabulary) of the dtype and device of `logits`.
        allowed: bool (vocabulary,), (1, vocabulary) or (rows, vocabulary); False excludes a token.
        ties: "keep" lets tokens of equal logits at the edge of top-p stay together; "transformers" keeps only as many
            of them as it takes, as the processor there does: those with the largest index (there an unstable sort
            chooses).

    Returns:
        token: int64 (rows,), the first whose cumulative weight in index order exceeds u times the kept weight; -1 for
            a row that is no distribution (NaN, +inf, or nothing but -inf), for the caller to check once after a loop.
        log_prob: (rows,), float32 (float64 for float64 logits), the log-probability in nats of the token among the
            kept ones; NaN where token is -1.

        Weights are rounded to multiples of about 2^-53 vocabulary (2^-36 at 50,257) of the largest, so that all sums
        are exact; arithmetic is in float32 (float64 for float64). There is no gradient: logits count as constants.

    Raises:
        ValueError: for an empty vocabulary, an option outside its range, a guidance_scale without unconditional logits,
            a repetition_penalty without a history, a position or seed out of range, or shapes or devices that do not
            fit.
        TypeError: for logits that are not floating, ids, seeds, positions or a history that are not int64, a top_k that
            is no integer, or an `allowed` that is not bool.
    """
    filters = Filters(
        guidance_scale, unconditional, repetition_penalty, history, allowed, temperature, top_k, top_p, min_p,
        typical_p, ties,
    )  # fmt: skip
    logits, filters = _checked(logits, filters)
    if sample_ids.shape != logits.shape[:1]:
        raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}, but expected ({logits.shape[0]},)")
    if sample_ids.device != logits.device:
        raise ValueError(f"sample_ids is on {sample_ids.device}, but expected {logits.device}, where logits is")
    seed, position = plain_number("seed", seed), plain_number("position", position)
    check_address(sample_ids, seed, 0)
    check_number("position", position, sample_ids, 0, DRAW_LIMIT)
    kernels = _native.kernels_for(logits)
    if kernels is None or logits.shape[1] >= _ALL:
        return sample_reference(logits, seed, sample_ids, position, filters)
    seed, seeds = split_seed(seed)
    position, positions = (0, position) if isinstance(position, Tensor) else (position, None)
    token, log_prob = kernels.sample_logits(logits, sample_ids, seed, seeds, position, positions, *_arguments(filters))
    return token, log_prob


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float = 1.0,
    history: Tensor | None = None,
    guidance_scale: float = 1.0,
    unconditional: Tensor | None = None,
    allowed: Tensor | None = None,
    ties: str = "keep",
) -> Tensor:
    """The log-probabilities of the distribution that `sample_logits` draws from, with the same options.

    Args:
        logits: (rows, vocabulary), float32, float64, bfloat16 or float16, any strides.
        The others: see `sample_logits`.

    Returns:
        (rows, vocabulary), float32 (float64 for float64 logits): log p in nats of each token that is kept, -inf for the
        others; with temperature 0 that is 0 for one token. NaN throughout a row that is no distribution.

    Raises:
        As `sample_logits`.
    """
    filters = Filters(
        guidance_scale, unconditional, repetition_penalty, history, allowed, temperature, top_k, top_p, min_p,
        typical_p, ties,
    )  # fmt: skip
    logits, filters = _checked(logits, filters)
    kernels = _native.kernels_for(logits)
    if kernels is None or logits.shape[1] >= _ALL:
        return filter_reference(logits, filters)
    log_probs: Tensor = kernels.filter_logits(logits, *_arguments(filters))
    return log_probs


def _arguments(filters: Filters) -> tuple[Any, ...]:
    """Filters as the operators take them; the rarer ones only where there are any."""
    top_k, top_p = filters.top_k, filters.top_p
    common = (float(filters.temperature), _ALL if top_k is None else min(top_k, _ALL), 1.0 if top_p is None else top_p)
    if (
        filters.min_p is None
        and filters.typical_p is None
        and filters.ties == "keep"
        and filters.guidance_scale == 1
        and filters.repetition_penalty == 1
        and filters.allowed is None
    ):
        return common
    return (
        *common, filters.min_p or 0.0, 1.0 if filters.typical_p is None else filters.typical_p,
        filters.ties == "transformers", filters.unconditional, float(filters.guidance_scale), filters.history,
        float(filters.repetition_penalty), filters.allowed,
    )  # fmt: skip


def _checked(logits: Tensor, filters: Filters) -> tuple[Tensor, Filters]:
    """The arguments as constants for autograd, `allowed` with two dimensions; raises what is wrong with them."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, but expected (rows, vocabulary) with a vocabulary of at least 1"
        )
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, but expected float32, float64, bfloat16 or float16")
    check_filters(filters)
    if filters.guidance_scale != 1 or filters.repetition_penalty != 1 or filters.allowed is not None:
        filters = _checked_tensors(logits, filters)
    return (logits.detach() if logits.requires_grad else logits), filters


def check_filters(filters: Filters) -> None:
    """Raise what is wrong with the options that are no tensors, in one sentence."""
    if not 0 <= filters.temperature < math.inf:
        raise ValueError(f"temperature is {filters.temperature}, but expected a finite number >= 0")
    top_k = filters.top_k
    if not (top_k is None or isinstance(top_k, int) or hasattr(top_k, "__index__")):
        raise TypeError(f"top_k is a {type(top_k).__name__}, but expected an int of at least 1, or None for all")
    if top_k is not None and not top_k >= 1:
        raise ValueError(f"top_k is {top_k}, but expected at least 1, or None for all")
    if filters.top_p is not None and not 0 < filters.top_p <= 1:
        raise ValueError(f"top_p is {filters.top_p}, but expected a number in (0, 1], or None for all")
    if filters.min_p is not None and not 0 <= filters.min_p <= 1:
        raise ValueError(f"min_p is {filters.min_p}, but expected a number in [0, 1], or None for all")
    if filters.typical_p is not None and not 0 < filters.typical_p <= 1:
        raise ValueError(f"typical_p is {filters.typical_p}, but expected a number in (0, 1], or None for all")
    if not 0 < filters.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty is {filters.repetition_penalty}, but expected a finite number > 0")
    if not -math.inf < filters.guidance_scale < math.inf:
        raise ValueError(f"guidance_scale is {filters.guidance_scale}, but expected a finite number")
    if filters.ties not in ("keep", "transformers"):
        raise ValueError(f'ties is {filters.ties!r}, but expected "keep" or "transformers"')


def _checked_tensors(logits: Tensor, filters: Filters) -> Filters:
    rows, vocabulary = logits.shape
    unconditional, history, allowed = filters.unconditional, filters.history, filters.allowed
    if filters.guidance_scale != 1:
        if unconditional is None:
            raise ValueError(f"guidance_scale is {filters.guidance_scale}, but there are no unconditional logits")
        if unconditional.dtype != logits.dtype:
            raise TypeError(
                f"unconditional has dtype {unconditional.dtype}, but expected {logits.dtype} as logits have"
            )
        if unconditional.shape != logits.shape:
            raise ValueError(
                f"unconditional has shape {tuple(unconditional.shape)}, but expected {tuple(logits.shape)}"
            )
        filters = filters._replace(unconditional=unconditional.detach())
    if filters.repetition_penalty != 1:
        if history is None:
            raise ValueError(f"repetition_penalty is {filters.repetition_penalty}, but there is no history")
        if history.dtype != torch.int64:
            raise TypeError(f"history has dtype {history.dtype}, but expected torch.int64")
        if history.dim() != 2 or history.shape[0] != rows:
            raise ValueError(f"history has shape {tuple(history.shape)}, but expected ({rows}, length)")
    if allowed is not None:
        if allowed.dtype != torch.bool:
            raise TypeError(f"allowed has dtype {allowed.dtype}, but expected torch.bool")
        wide = allowed[None] if allowed.dim() == 1 else allowed
        if wide.dim() != 2 or wide.shape[0] not in (1, rows) or wide.shape[1] != vocabulary:
            raise ValueError(
                f"allowed has shape {tuple(allowed.shape)}, but expected ({vocabulary},), (1, {vocabulary}) or "
                f"({rows}, {vocabulary})"
            )
        filters = filters._replace(allowed=wide)
    for name, tensor in (("unconditional", unconditional), ("history", history), ("allowed", allowed)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, but expected {logits.device}, where logits is")
    return filters

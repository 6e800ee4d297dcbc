"""Speculative sampling: which of several drafted tokens are kept, and the token after them.

A token x drafted from q is kept with probability min(1, p(x) / q(x)), and the first that is not is drawn again from the
positive part of p - q; so every token has the target's distribution p. (Leviathan et al. 2023, arXiv:2211.17192,
algorithm 1 and appendix A.1; Chen et al. 2023, arXiv:2302.01318, algorithm 2)
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
from pygen.ops.sampling import sample_logits_reference
from pygen.ops.sampling_reference import inverse_reference, uniform_of_words, weights_reference


def speculative_accept_reference(
    draft_tokens: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`speculative_accept` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    seed, position = plain_number("seed", seed), plain_number("position", position)
    rows, steps, vocabulary = target_logits.shape
    seeds = seed if isinstance(seed, Tensor) else sample_ids.new_tensor(signed_seed(seed))
    positions = position if isinstance(position, Tensor) else sample_ids.new_tensor(position)
    dtype = torch.float64 if target_logits.dtype == torch.float64 else torch.float32
    tokens = sample_ids.new_full((rows, steps), -1)
    log_prob = target_logits.new_full((rows, steps), math.nan, dtype=dtype)
    accepted, going = sample_ids.new_zeros(rows), torch.ones_like(sample_ids, dtype=torch.bool)
    for step in range(steps):
        x = target_logits[:, step].to(dtype)
        own = draft_tokens[:, step] if step < steps - 1 else sample_ids.new_full((rows,), -1)
        drawn, log_drawn = sample_logits_reference(x, seed=seed, sample_ids=sample_ids, position=positions + step)
        y = draft_logits[:, step].to(dtype) if step < steps - 1 else x
        drafted = own >= 0
        valid = (drawn >= 0) & (_valid(y) | ~drafted) & (own < vocabulary)
        clean_x, clean_y = torch.where(valid[:, None], x, 0.0), torch.where(valid[:, None], y, 0.0)
        clean_y = torch.where(drafted[:, None], clean_y, 0.0)
        p, q = (weights_reference(z - z.amax(-1, keepdim=True)) for z in (clean_x, clean_y))
        p_total, q_total = p.sum(-1), q.sum(-1)
        words = philox_reference(seeds, sample_ids, TOKEN_STREAM, positions + step, torch.ones_like(sample_ids))
        at = torch.where(valid & drafted, own, 0)[:, None]
        p_own, q_own = p.gather(1, at)[:, 0], q.gather(1, at)[:, 0]
        keeps = drafted & (uniform_of_words(words[:, :2]) * (q_own / q_total) < p_own / p_total)
        residual = (p - q * (p_total / q_total)[:, None]).clamp(min=0).round()
        residual = torch.where((residual.sum(-1) > 0)[:, None], residual, p)
        replaced = inverse_reference(residual, uniform_of_words(words[:, 2:]))
        token = torch.where(drafted, torch.where(keeps, own, replaced), drawn)
        chosen = clean_x.log_softmax(-1).gather(1, torch.where(valid, token, 0)[:, None])[:, 0]
        now = going & valid
        tokens[:, step] = torch.where(now, token, -1)
        log_prob[:, step] = torch.where(now, torch.where(drafted, chosen, log_drawn), math.nan)
        going = now & keeps
        accepted = accepted + going
    return tokens, accepted, log_prob


def _valid(x: Tensor) -> Tensor:
    """Whether a row is a distribution."""
    return x.amax(-1).isfinite() & ~x.isnan().any(-1)


@_native.register_fake("speculative_accept")
def _speculative_accept_fake(
    draft_tokens: Tensor, draft_logits: Tensor, target_logits: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps = target_logits.shape[:2]
    dtype = torch.float64 if target_logits.dtype == torch.float64 else torch.float32
    return (
        target_logits.new_empty((rows, steps), dtype=torch.int64),
        target_logits.new_empty((rows,), dtype=torch.int64),
        target_logits.new_empty((rows, steps), dtype=dtype),
    )


def speculative_accept(
    draft_tokens: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    position: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the drafted tokens that speculative sampling keeps, and draw the one after them.

    The tokens have the distribution of `target_logits`, whatever the drafts were drawn from, as long as it was
    `draft_logits`. The decision on token i, and the draw in its place, take two numbers of their own from (seed, sample
    id, position + i), which `sample_logits` does not use; where all drafts are kept, the last token is what
    `sample_logits` would draw there.

    Args:
        draft_tokens: int64 (rows, k), drawn one after the other from draft_logits; -1 ends a row's drafts, and the
            target draws there. k may be 0.
        draft_logits: (rows, k, vocabulary), what they were drawn from, any floating dtype and strides. Where drafts are
            filtered or have a temperature, this is what `filter_logits` makes of the logits.
        target_logits: (rows, k + 1, vocabulary), in the same dtype: the target's, given the drafts before each.
        seed: an int of at most 64 bits, or an int64 tensor, () or (rows,).
        sample_ids: int64 (rows,), which sample each row belongs to.
        position: of the first draft among the sample's tokens, 0 .. 2^30 - 1 - k, or an int64 tensor, () or (rows,).

    Returns:
        tokens: int64 (rows, k + 1): the drafts that are kept, one token more, and then -1.
        accepted: int64 (rows,), how many drafts are kept, 0 .. k. tokens is -1 there for a row in which a distribution
            that was needed is none, or a draft is no token.
        log_prob: (rows, k + 1), float32 (float64 for float64 logits), the target's log-probability in nats of each
            token; NaN where it is -1.

    Raises:
        ValueError: for shapes or devices that do not fit, a position or seed out of range.
        TypeError: for logits that are not floating or of two dtypes, or tokens, ids, seeds or positions that are not
            int64.
    """
    if target_logits.dim() != 3 or target_logits.shape[1] == 0 or target_logits.shape[2] == 0:
        raise ValueError(
            f"target_logits has shape {tuple(target_logits.shape)}, but expected (rows, drafts + 1, vocabulary)"
        )
    rows, steps, vocabulary = target_logits.shape
    if not target_logits.is_floating_point():
        raise TypeError(
            f"target_logits has dtype {target_logits.dtype}, but expected float32, float64, bfloat16 or float16"
        )
    if draft_logits.dtype != target_logits.dtype:
        raise TypeError(f"draft_logits has dtype {draft_logits.dtype}, but expected {target_logits.dtype}")
    if draft_tokens.dtype != torch.int64:
        raise TypeError(f"draft_tokens has dtype {draft_tokens.dtype}, but expected torch.int64")
    for name, tensor, shape in (
        ("draft_logits", draft_logits, (rows, steps - 1, vocabulary)),
        ("draft_tokens", draft_tokens, (rows, steps - 1)),
        ("sample_ids", sample_ids, (rows,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but expected {shape}")
        if tensor.device != target_logits.device:
            raise ValueError(f"{name} is on {tensor.device}, but expected {target_logits.device}")
    seed, position = plain_number("seed", seed), plain_number("position", position)
    check_address(sample_ids, seed, 0)
    check_number("position", position, sample_ids, 0, DRAW_LIMIT - steps + 1)
    draft_logits, target_logits = draft_logits.detach(), target_logits.detach()
    kernels = _native.kernels_for(target_logits)
    if kernels is None:
        return speculative_accept_reference(
            draft_tokens, draft_logits, target_logits, seed=seed, sample_ids=sample_ids, position=position
        )
    seed, seeds = split_seed(seed)
    position, positions = (0, position) if isinstance(position, Tensor) else (position, None)
    tokens, accepted, log_prob = kernels.speculative_accept(
        draft_tokens, draft_logits, target_logits, sample_ids, seed, seeds, position, positions
    )
    return tokens, accepted, log_prob

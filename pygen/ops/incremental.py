"""Advance samples of an autoregressive network element by element, each of its activations computed once.

Step t computes what the elements before t make computable and what element t's distribution needs, then draws element
t: token = sample_logits(logits), or a level of a discretized mixture of logistics. (Ramachandran et al. 2017,
arXiv:1704.06001; van den Oord et al. 2016, PixelRNN, arXiv:1601.06759, section 3.4 for the order)

Programs are written by `pygen.autoregressive.incremental`; what they hold is in incremental_program.py.
"""

from __future__ import annotations

from torch import Tensor

from pygen import _native
from pygen.ops.incremental_program import Program
from pygen.ops.incremental_reference import advance
from pygen.ops.noise import check_address, plain_number, split_seed
from pygen.ops.sampling import check_filters
from pygen.ops.sampling_reference import Filters

MODES = ("follow", "score", "draw")  # in the order of the enum in csrc/incremental_checks.h
_ALL = 2**31


def incremental_advance_reference(
    state: Tensor,
    tokens: Tensor,
    weights: Tensor,
    program: Program,
    conditions: Tensor,
    values: Tensor,
    *,
    sample_ids: Tensor,
    seed: int | Tensor,
    begin: int,
    end: int,
    known: Tensor | None = None,
    mode: str = "draw",
    logistics: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    ties: str = "keep",
    with_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """`incremental_advance` in plain PyTorch: its specification, its fallback, and the oracle of its tests."""
    filters = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "ties": ties,
    }  # fmt: skip
    return advance(
        state, tokens, weights, program, conditions, values, sample_ids=sample_ids, seed=seed, begin=begin, end=end,
        known=known, mode=mode, logistics=logistics, filters=filters, with_logits=with_logits,
    )  # fmt: skip


@_native.register_fake("incremental_advance")
def _advance_fake(
    state: Tensor, tokens: Tensor, weights: Tensor, program: Tensor, device_program: Tensor, vocabulary: int,
    conditions: Tensor, values: Tensor, known: Tensor | None, sample_ids: Tensor, seed: int, seeds: Tensor | None,
    begin: int, end: int, action: int, logistics: int, temperature: float, top_k: int, top_p: float, min_p: float,
    typical_p: float, split_ties: bool, with_logits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, steps = state.shape[0], end - begin
    return state.new_empty((n, steps)), state.new_empty((n, steps if with_logits else 0, vocabulary))


def incremental_advance(
    state: Tensor,
    tokens: Tensor,
    weights: Tensor,
    program: Program,
    conditions: Tensor,
    values: Tensor,
    *,
    sample_ids: Tensor,
    seed: int | Tensor,
    begin: int,
    end: int,
    known: Tensor | None = None,
    mode: str = "draw",
    logistics: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    ties: str = "keep",
    with_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run steps begin .. end (not included) of a program for each sample, in one call.

    Step t first writes element t - 1, which tokens has to hold by then, and ends with element t's logits and draw. So
    steps are run in their order from 0 on; a step may be repeated, as long as no later one was run in between.

    Args:
        state: (n, program.state), changed in place; float32 or float64, the type of the arithmetic.
        tokens: int64 (n, program.steps), changed in place where tokens are drawn; in 0 .. len(values) - 1.
        weights: (program.weights,), packed as the program says.
        program: which network; see `Program`.
        conditions: (n, program.conditions), what the network makes of each sample's condition.
        values: (levels,), what each token is as an element of the sample.
        sample_ids: int64 (n,), whose draw each row is; seed: an int of at most 64 bits, or int64 () or (n,). The draw
            of element t is the one of `sample_logits` at position t.
        known: bool (n, program.steps), tokens that are given: they are not drawn. None draws all.
        mode: "draw"; "score" gives log-probabilities of the tokens that are there; "follow" neither.
        logistics: levels, where the network's outputs are a discretized mixture of logistics for each pixel (see
            `sample_discretized_logistics`) and the tokens its levels; 0 for logits.
        temperature, top_k, top_p, min_p, typical_p, ties: see `sample_logits`; not for logistics.
        with_logits: whether to return the logits (or the parameters of the mixture) of each step.

    Returns:
        log_prob: (n, end - begin), the log-probability in nats of each token drawn or scored, 0 for one that was known;
            NaN, with token -1, where the logits were no distribution.
        logits: (n, end - begin, program.vocabulary), or (n, 0, program.vocabulary).

        A row does not depend, to the bit, on the rows beside it, their order or number, or on threads. No gradient.

    Raises:
        ValueError: for an unknown mode, a filter or seed outside its range, or filters with logistics.
        TypeError: for ids or a seed that are not int64, or a top_k that is no integer.
        RuntimeError: for other shapes, dtypes and devices that do not fit the program, and steps that it does not have.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, but expected one of {', '.join(map(repr, MODES))}")
    seed = plain_number("seed", seed)
    check_address(sample_ids, seed, 0)
    check_filters(
        Filters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, ties=ties)
    )
    if logistics and (temperature != 1 or any(each is not None for each in (top_k, top_p, min_p, typical_p))):
        raise ValueError("a mixture of logistics is drawn as it is: temperature and filters are for logits")
    kernels = _native.kernels_for(state)
    if kernels is None or program.vocabulary >= _ALL:
        return incremental_advance_reference(
            state, tokens, weights, program, conditions, values, sample_ids=sample_ids, seed=seed, begin=begin, end=end,
            known=known, mode=mode, logistics=logistics, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            typical_p=typical_p, ties=ties, with_logits=with_logits,
        )  # fmt: skip
    number, seeds = split_seed(seed)
    log_prob, logits = kernels.incremental_advance(
        state, tokens, weights, program.code, program.on(state.device), program.vocabulary, conditions, values, known,
        sample_ids, number, seeds, begin, end, MODES.index(mode), logistics, float(temperature),
        _ALL if top_k is None else min(top_k, _ALL), 1.0 if top_p is None else float(top_p),
        0.0 if min_p is None else float(min_p), 1.0 if typical_p is None else float(typical_p), ties != "keep",
        with_logits,
    )  # fmt: skip
    return log_prob, logits

"""Guidance, repetition penalty, masks and filters of the sampler: against transformers' processors, a float64 oracle of
each definition, and the reference."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from cases import DTYPES, opcheck
from goodness import fit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import ops


def close_rows(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The same support exactly, and log-probabilities up to rounding."""
    assert torch.equal(actual.isfinite(), expected.isfinite())
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def processed(logits: Tensor, *processors: object, history: Tensor | None = None) -> Tensor:
    """Log-probabilities after transformers' processors, in float64, so that only the definitions are compared."""
    ids = torch.zeros(len(logits), 1, dtype=torch.int64) if history is None else history
    return transformers.LogitsProcessorList(processors)(ids, logits.double().cpu()).log_softmax(-1)


TRANSFORMERS = {
    "temperature": ({"temperature": 0.7}, lambda t: [t.TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 12}, lambda t: [t.TopKLogitsWarper(12)]),
    "top-p": ({"top_p": 0.83}, lambda t: [t.TopPLogitsWarper(0.83)]),
    "min-p": ({"min_p": 0.07}, lambda t: [t.MinPLogitsWarper(0.07)]),
    "typical": ({"typical_p": 0.77}, lambda t: [t.TypicalLogitsWarper(0.77)]),
    "all": (
        {"temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.03, "typical_p": 0.85},
        lambda t: [
            t.TemperatureLogitsWarper(1.3), t.TopKLogitsWarper(60), t.TopPLogitsWarper(0.9), t.MinPLogitsWarper(0.03),
            t.TypicalLogitsWarper(0.85),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("ties", ["keep", "transformers"])
def test_keeps_what_transformers_keeps(backend, device, name, ties):
    options, processors = TRANSFORMERS[name]
    for vocabulary in (1, 2, 70, 700):
        logits = 2 * torch.randn(4, vocabulary, device=device)
        actual = ops.filter_logits(logits, ties=ties, **options)
        close_rows(actual.cpu(), processed(logits, *processors(transformers)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_ties_as_transformers_does(backend, device, dtype):
    """Logits of few values: nearly every threshold falls on a tie, also one of both zeros. Which ones of a tie are kept
    is up to torch.sort there, which is stable up to 16 elements; how many are is not."""
    split = 0
    for vocabulary in (15, 40):
        logits = (1.3 * torch.randn(40, vocabulary, device=device)).round().to(dtype)
        logits = torch.where((logits == 0) & (torch.rand_like(logits.float()) < 0.5), -0.0, logits)
        for top_p in (0.13, 0.47, 0.61, 0.9):
            for extra, warpers in (({}, []), ({"top_k": 9}, [transformers.TopKLogitsWarper(9)])):
                actual = ops.filter_logits(logits, top_p=top_p, ties="transformers", **extra).cpu()
                expected = processed(logits, *warpers, transformers.TopPLogitsWarper(top_p))
                if vocabulary == 15:
                    close_rows(actual, expected)
                else:
                    close_rows(actual.sort().values, expected.sort().values)
                whole = ops.filter_logits(logits, top_p=top_p, **extra).cpu()
                assert (whole.isfinite() >= actual.isfinite()).all()
                split += int((whole.isfinite() & ~actual.isfinite()).sum())
                # Those that are left out are the first ones of their value.
                for row, kept in zip(logits.cpu(), actual.isfinite(), strict=True):
                    tied = kept[row == row[kept].min()].int()
                    assert torch.equal(tied, tied.sort().values)
    assert split > 100


def test_penalizes_repetition_as_transformers_does(backend, device):
    for vocabulary in (5, 300):
        logits = 2 * torch.randn(6, vocabulary, device=device)
        history = torch.randint(0, vocabulary, (6, 40), device=device)
        for penalty in (1.3, 0.7):
            actual = ops.filter_logits(logits, repetition_penalty=penalty, history=history, top_p=0.9)
            expected = processed(
                logits, transformers.RepetitionPenaltyLogitsProcessor(penalty), transformers.TopPLogitsWarper(0.9),
                history=history.cpu(),
            )  # fmt: skip
            close_rows(actual.cpu(), expected)


def test_an_id_counts_once_and_padding_not_at_all(backend, device):
    logits = torch.tensor([[1.0, -1.0, 0.5, 0.0]], device=device)
    once = torch.tensor([[0, 1]], device=device)
    often = torch.tensor([[1, 0, -1, 0, 0, 4, 2**40, 1, -(2**63)]], device=device)
    options = {"repetition_penalty": 2.0}
    expected = torch.tensor([[0.5, -2.0, 0.5, 0.0]]).log_softmax(-1)
    for history in (once, often, often[:, ::2], often.repeat(1, 700)):
        actual = ops.filter_logits(logits, history=history, **options)
        torch.testing.assert_close(actual.cpu(), expected)
    nothing = ops.filter_logits(logits, history=once[:, :0], **options)
    torch.testing.assert_close(nothing.cpu(), logits.cpu().log_softmax(-1))


class Unconditional:
    """A model whose logits are given, for transformers' guidance."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, *_: object, **__: object) -> object:
        class Output(dict):
            logits = self.logits[:, None]

        return Output()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.7, 4.0, -1.0])
def test_guides_as_transformers_does(backend, device, scale):
    logits, other = 2 * torch.randn(5, 90, device=device), 2 * torch.randn(5, 90, device=device)
    history = torch.randint(0, 90, (5, 30), device=device)
    guidance = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, Unconditional(other.double().cpu()))
    options = {"guidance_scale": scale, "unconditional": other}
    close_rows(ops.filter_logits(logits, **options).cpu(), processed(logits, guidance, history=history.cpu()), 3e-5)
    # The penalty sees normalized scores, nearly all of them negative.
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    actual = ops.filter_logits(logits, repetition_penalty=1.5, history=history, **options)
    close_rows(actual.cpu(), processed(logits, guidance, penalty, history=history.cpu()), 3e-5)


def test_guidance_of_one_is_the_conditional_row(backend, device):
    logits, broken = torch.randn(2, 9, device=device), torch.full((2, 9), math.nan, device=device)
    plain = ops.filter_logits(logits)
    assert torch.equal(ops.filter_logits(logits, guidance_scale=1, unconditional=broken), plain)


def test_either_row_of_a_pair_excludes(backend, device):
    for dtype in DTYPES:
        for history in (None, torch.tensor([[1]], device=device)):
            logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf, 0.5]], dtype=dtype, device=device)
            other = torch.tensor([[0.0, 1.0, -math.inf, -math.inf, 0.5]], dtype=dtype, device=device)
            options = {} if history is None else {"repetition_penalty": 1.5, "history": history}
            for scale in (0.0, 0.5, 2.0, -1.0):
                kept = ops.filter_logits(logits, guidance_scale=scale, unconditional=other, **options)
                assert kept[0].isfinite().tolist() == [True, False, False, False, True]


def test_rows_of_a_pair_that_are_no_distribution_are_marked(backend, device):
    logits, other = torch.randn(6, 40, device=device), torch.randn(6, 40, device=device)
    logits[1, 3] = math.nan
    other[2, 39] = math.nan
    other[3] = -math.inf
    logits[4, 0] = math.inf
    ids = torch.arange(6, device=device)
    history = torch.zeros(6, 1, dtype=torch.int64, device=device)
    for extra in ({}, {"repetition_penalty": 1.5, "history": history}):
        options = {"guidance_scale": 2.0, "unconditional": other, **extra}
        token, log_prob = ops.sample_logits(logits, seed=0, sample_ids=ids, position=0, **options)
        assert (token == -1).tolist() == [False, True, True, True, True, False]
        assert torch.equal(log_prob.isnan(), token == -1)
        rows = ops.filter_logits(logits, **options)
        assert torch.equal(rows.isnan().all(-1), token == -1)
        assert torch.equal(rows.isnan().any(-1), token == -1)


def test_allows_only_what_is_allowed(backend, device):
    logits = torch.randn(4, 50, device=device)
    rows = torch.rand(4, 50, device=device) < 0.3
    for allowed in (rows, rows[:1], rows[2], rows.T.contiguous().T):
        expected = logits.masked_fill(~allowed, -math.inf).log_softmax(-1)
        close_rows(ops.filter_logits(logits, allowed=allowed), expected)
    ids = torch.arange(4, device=device)
    nothing = torch.zeros(50, dtype=torch.bool, device=device)
    for temperature in (0.0, 1.0):
        token, log_prob = ops.sample_logits(
            logits, seed=0, sample_ids=ids, position=0, allowed=nothing, temperature=temperature
        )
        assert (token == -1).all() and log_prob.isnan().all()
    # Greedy, the best of what is allowed, and of guided and penalized scores.
    token, _ = ops.sample_logits(logits, seed=0, sample_ids=ids, position=0, allowed=rows, temperature=0)
    assert torch.equal(token, logits.masked_fill(~rows, -math.inf).argmax(-1))
    best = logits.argmax(-1, keepdim=True)
    token, _ = ops.sample_logits(
        logits.abs(), seed=0, sample_ids=ids, position=0, history=best, repetition_penalty=1e6, temperature=0
    )
    assert torch.equal(token, logits.abs().scatter(1, best, logits.abs().gather(1, best) / 1e6).argmax(-1))


OPTIONS = [
    {}, {"temperature": 0.4}, {"top_k": 7, "min_p": 0.3}, {"top_p": 0.8, "typical_p": 0.6}, {"temperature": 0.0},
    {"repetition_penalty": 1.4}, {"guidance_scale": 2.5}, {"guidance_scale": 0.4, "repetition_penalty": 0.8},
    {"guidance_scale": 1.5, "repetition_penalty": 1.2, "top_k": 25, "top_p": 0.9, "ties": "transformers"},
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampler_and_filter_equal_their_references(backend, device, dtype):
    ids = torch.arange(5, device=device)
    for vocabulary in (1, 64, 400):
        logits = (2 * torch.randn(5, vocabulary, device=device)).to(dtype)
        tensors = {
            "unconditional": torch.randn(vocabulary, 5, device=device).to(dtype).T,
            "history": torch.randint(-1, vocabulary + 1, (5, 26), device=device)[:, ::2],
        }
        for allowed in (None, torch.arange(vocabulary, device=device) % 3 != 1):
            for options in OPTIONS:
                options = {**options, **tensors, "allowed": allowed}
                rows = ops.filter_logits(logits, **options)
                expected = ops.filter_logits_reference(
                    logits, **{**options, "allowed": None if allowed is None else allowed[None]}
                )
                assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                close_rows(rows, expected)
                address = {"seed": 7, "sample_ids": ids, "position": 2}
                token, log_prob = ops.sample_logits(logits, **address, **options)
                again = ops.sample_logits(rows, **address, temperature=1.0)
                assert torch.equal(token, again[0])
                torch.testing.assert_close(log_prob, rows.gather(1, token[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_typical_by_its_definition(backend, device):
    """In float64, by a loop in order of distance from the entropy."""
    for spread in (0.3, 2.0, 6.0):
        logits = spread * torch.randn(6, 120, dtype=torch.float64, device=device)
        for mass in (0.2, 0.6, 0.95):
            kept = ops.filter_logits(logits, typical_p=mass).isfinite()
            for row, mask in zip(logits.log_softmax(-1), kept, strict=True):
                far = (-row - -(row.exp() * row).sum()).abs()
                chosen, total = torch.zeros_like(mask), 0.0
                for i in far.argsort().tolist():
                    if total >= mass:
                        break
                    chosen[i] = True
                    total += float(row[i].exp())
                assert torch.equal(chosen, mask)


DISTRIBUTIONS = {
    "min-p": ({"min_p": 0.2}, lambda t: [t.MinPLogitsWarper(0.2)]),
    "typical": ({"typical_p": 0.6}, lambda t: [t.TypicalLogitsWarper(0.6)]),
    "penalty": ({"repetition_penalty": 1.8}, lambda t: [t.RepetitionPenaltyLogitsProcessor(1.8)]),
    "guidance": ({"guidance_scale": 1.7}, lambda t: []),
    "all": (
        {"guidance_scale": 1.7, "repetition_penalty": 1.8, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
        lambda t: [
            t.RepetitionPenaltyLogitsProcessor(1.8), t.TopKLogitsWarper(30), t.TopPLogitsWarper(0.95),
            t.MinPLogitsWarper(0.02), t.TypicalLogitsWarper(0.9),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_transformers_distribution(backend, device, name):
    """Every token that is kept, and no other, as often as it should: see the test of `fit` for what that sees."""
    options, warpers = DISTRIBUTIONS[name]
    draws = 800 if backend == "simt" else 60_000
    logits, other = 1.5 * torch.randn(40, device=device), 1.5 * torch.randn(40, device=device)
    history = torch.randint(40, (15,), device=device)
    processors = warpers(transformers)
    if "guidance_scale" in options:
        guidance = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
            options["guidance_scale"], Unconditional(other[None].double().cpu())
        )
        processors = [guidance, *processors]
    probability = processed(logits[None], *processors, history=history[None].cpu())[0].exp()
    rows = {"unconditional": other.expand(draws, -1), "history": history.expand(draws, -1)}
    token, log_prob = ops.sample_logits(
        logits.expand(draws, -1), seed=5, sample_ids=torch.arange(draws, device=device), position=0, **rows, **options
    )
    token = token.cpu()
    assert fit(token, probability) > 1e-4
    assert (probability[token] > 0).all()
    torch.testing.assert_close(log_prob.cpu(), probability.log().float()[token], rtol=3e-5, atol=3e-5)


def test_a_row_does_not_depend_on_its_batch(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        logits, other = ((3 * torch.randn(5, 1000, device=device)).to(dtype) for _ in range(2))
        ids = torch.tensor([7, 2**40, -3, 0, 99], device=device)
        rows = {
            "logits": logits, "unconditional": other, "history": torch.randint(1000, (5, 70), device=device),
            "allowed": torch.rand(5, 1000, device=device) < 0.8, "sample_ids": ids,
        }  # fmt: skip
        options = {
            "seed": 4, "position": 12, "guidance_scale": 1.5, "repetition_penalty": 1.3, "top_p": 0.9, "min_p": 0.001,
            "typical_p": 0.8, "ties": "transformers",
        }  # fmt: skip
        together = ops.sample_logits(**rows, **options)
        for chosen in (torch.tensor([3, 1, 4, 0, 2], device=device), torch.tensor([2], device=device)):
            part = ops.sample_logits(**{name: tensor[chosen] for name, tensor in rows.items()}, **options)
            assert torch.equal(part[0], together[0][chosen])
            assert torch.equal(part[1], together[1][chosen])


@given(
    st.integers(1, 300), st.integers(0, 60), st.sampled_from([1.0, 0.5, 1.5, 20.0]),
    st.sampled_from([1.0, 0.0, 3.0, -2.0]), st.booleans(), st.booleans(), st.integers(0, 2**30),
)  # fmt: skip
def test_any_score(vocabulary, length, penalty, scale, masked, excluded, seed):
    torch.manual_seed(seed)
    logits, other = (2 * torch.randn(3, vocabulary, dtype=torch.float64) for _ in range(2))
    if excluded:
        logits[:, ::3] = -math.inf
    options = {
        "repetition_penalty": penalty, "history": torch.randint(-2, vocabulary + 2, (3, length)),
        "guidance_scale": scale, "unconditional": other, "allowed": torch.rand(3, vocabulary) < 0.7 if masked else None,
        "top_p": 0.9,
    }  # fmt: skip
    close_rows(ops.filter_logits(logits, **options), ops.filter_logits_reference(logits, **options), 1e-11)


def test_filter_of_no_rows(backend, device):
    assert ops.filter_logits(torch.empty(0, 4, device=device), top_p=0.5).shape == (0, 4)


def test_unwritten_rows_would_show(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        for vocabulary in (1, 40, 5000):
            logits = torch.randn(3, vocabulary, device=device)
            history = torch.zeros(3, 2, dtype=torch.int64, device=device)
            for options in ({}, {"top_p": 0.5}, {"temperature": 0.0}, {"repetition_penalty": 2.0, "history": history}):
                assert not ops.filter_logits(logits, **options).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_raw_operators_pass_opcheck(backend, device, namespace):
    operators = getattr(torch.ops, namespace)
    logits, other = torch.randn(2, 9, device=device), torch.randn(2, 9, device=device)
    history, allowed = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.ones(1, 9, device=device) > 0
    options = (0.7, 5, 0.9, 0.1, 0.8, True, other, 2.0, history, 1.3, allowed)
    opcheck(operators.filter_logits.default, (logits, *options))
    opcheck(operators.filter_logits.default, (logits.T.contiguous().T.double(), 0.0, 2**31, 1.0))
    ids = torch.arange(2, device=device)
    opcheck(operators.sample_logits.default, (logits, ids, 1, None, 2, None, *options))


def test_compiles_in_one_graph(backend, device):
    logits, other = torch.randn(3, 40, device=device), torch.randn(3, 40, device=device)
    history = torch.randint(0, 40, (3, 5), device=device)

    def step(logits: Tensor, other: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        options = {"guidance_scale": 2.0, "unconditional": other, "repetition_penalty": 1.1, "history": history}
        ids = torch.arange(3, device=logits.device)
        rows = ops.filter_logits(logits, min_p=0.01, **options)
        return rows, ops.sample_logits(logits, seed=1, sample_ids=ids, position=3, typical_p=0.9, **options)[0]

    compiled = torch.compile(step, fullgraph=True)
    for actual, expected in zip(compiled(logits, other, history), step(logits, other, history), strict=True):
        assert torch.equal(actual, expected)

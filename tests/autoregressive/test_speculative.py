"""Speculative sampling: exactly the model's distribution, whatever the draft, and fewer passes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from goodness import fit
from hypothesis import given
from hypothesis import strategies as st
from markov import MarkovChain, one_by_one

from pygen.autoregressive.speculative import speculative_sample


def pair(vocabulary: int, length: int, distance: float = 1.0) -> tuple[MarkovChain, MarkovChain]:
    """A model and a draft model that differs by `distance`."""
    table = 1.5 * torch.randn(vocabulary, vocabulary, vocabulary)
    return MarkovChain(table, length), MarkovChain(table + distance * torch.randn_like(table), length)


@pytest.mark.parametrize("lookahead", [1, 2, 5])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8}])
def test_samples_have_the_models_distribution(lookahead, filters):
    """All 256 sequences of four tokens of four values, in a batch in which some samples are ahead of others."""
    model, draft = pair(4, 4)
    samples = speculative_sample(model, draft, 30_000, lookahead=lookahead, seed=2, **filters)
    sequences = torch.tensor(list(itertools.product(range(4), repeat=4)))
    probability = model.log_prob(sequences, **filters).exp()
    assert abs(float(probability.sum()) - 1) < 1e-9
    number = (samples.tokens * torch.tensor([64, 16, 4, 1])).sum(1)
    assert fit(number, probability) > 1e-4
    torch.testing.assert_close(samples.log_prob, model.log_prob(samples.tokens, **filters), rtol=1e-5, atol=1e-5)


def test_the_goodness_of_fit_sees_the_drafts_distribution():
    model, draft = pair(4, 4, distance=0.3)
    sequences = torch.tensor(list(itertools.product(range(4), repeat=4)))
    wrong = torch.multinomial(draft.log_prob(sequences).exp(), 30_000, replacement=True)
    assert fit(wrong, model.log_prob(sequences).exp()) < 1e-12


def test_a_good_draft_saves_passes():
    model, draft = pair(6, 60, distance=0.2)
    same = speculative_sample(model, model, 8, lookahead=4)
    assert same.passes <= math.ceil(60 / 5) + 1  # lookahead + 1 tokens a pass, and the call for the first logits
    near = speculative_sample(model, draft, 1, lookahead=4, ids=torch.tensor([3]))
    assert same.passes < near.passes < 40
    assert near.draft_passes <= 4 * near.passes + 1


def test_greedy_samples_are_those_of_the_loop():
    model, draft = pair(5, 20)
    samples = speculative_sample(model, draft, 3, temperature=0)
    assert torch.equal(samples.tokens, one_by_one(model, 3, temperature=0)[0])


@given(
    st.integers(0, 4), st.integers(1, 15), st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.floats(0, 4),
    st.integers(0, 2**30),
)  # fmt: skip
def test_a_sample_does_not_depend_on_its_batch(n, length, vocabulary, lookahead, given_tokens, distance, seed):
    torch.manual_seed(seed)
    model, draft = pair(vocabulary, length, distance)
    ids = torch.randint(-(2**40), 2**40, (n,))
    prefix = torch.randint(vocabulary, (n, min(given_tokens, length)))
    together = speculative_sample(model, draft, n, lookahead=lookahead, ids=ids, prefix=prefix, seed=seed)
    assert torch.equal(together.tokens[:, : prefix.shape[1]], prefix)
    for row in range(n):
        own = slice(row, row + 1)
        alone = speculative_sample(model, draft, 1, lookahead=lookahead, ids=ids[own], prefix=prefix[own], seed=seed)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.log_prob[0] == together.log_prob[row]
        assert alone.passes <= length + 1


def test_broken_logits_are_named_by_their_sample():
    model, draft = pair(4, 10)
    model.table[:, 1] = math.nan
    with pytest.raises(RuntimeError, match="sample 7 met logits that are no distribution"):
        speculative_sample(model, draft, 1, ids=torch.tensor([7]), prefix=torch.ones(1, 2, dtype=torch.int64))


def test_refuses_in_one_sentence():
    model, draft = pair(4, 10)
    other, _ = pair(5, 10)
    for message, (drafter, options) in {
        "lookahead is 0, but expected at least 1": (draft, {"lookahead": 0}),
        "draft has 10 tokens of 5 values, but expected 10 of 4": (other, {}),
        "lookahead is 1.5, but expected an int of at least 1": (draft, {"lookahead": 1.5}),
        "ids has shape (3,), but expected (2,)": (draft, {"ids": torch.arange(3)}),
        "n is -1, but expected at least 0": (draft, {"n": -1}),
        "prefix has the value 4, but expected 0 to 3": (draft, {"prefix": torch.full((2, 1), 4)}),
    }.items():
        with pytest.raises((ValueError, TypeError)) as error:
            speculative_sample(model, drafter, **{"n": 2, **options})
        assert message in str(error.value)

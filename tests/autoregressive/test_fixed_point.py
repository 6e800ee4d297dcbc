"""Fixed-point iteration: the samples of the loop token by token, in fewer passes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markov import MarkovChain, one_by_one

from pygen.autoregressive import MADEConfig, MaskedAutoencoder, TokenTransformer, TokenTransformerConfig
from pygen.autoregressive.fixed_point import fixed_point_sample


def chain(vocabulary: int, length: int, coupling: float = 1.0) -> MarkovChain:
    """`coupling` is how much the tokens before say."""
    table = torch.randn(vocabulary) + coupling * torch.randn(vocabulary, vocabulary, vocabulary)
    return MarkovChain(table, length)


@given(
    st.integers(0, 5), st.integers(1, 20), st.integers(1, 9), st.integers(0, 8), st.integers(1, 25), st.booleans(),
    st.sampled_from([{}, {"temperature": 0.6, "top_k": 3}, {"top_p": 0.8}, {"temperature": 0.0}, {"min_p": 0.1}]),
    st.integers(0, 2**30),
)  # fmt: skip
def test_samples_are_those_of_the_loop(n, length, vocabulary, given_tokens, window, guessed, filters, seed):
    torch.manual_seed(seed)
    model = chain(vocabulary, length)
    ids = torch.randint(-(2**40), 2**40, (n,))
    prefix = torch.randint(vocabulary, (n, min(given_tokens, length)))
    guess = torch.randint(vocabulary, (n, length)) if guessed else None
    tokens, log_prob = one_by_one(model, n, ids=ids, seed=seed, prefix=prefix, **filters)
    samples = fixed_point_sample(model, n, window=window, ids=ids, seed=seed, prefix=prefix, guess=guess, **filters)
    assert torch.equal(samples.tokens, tokens)
    torch.testing.assert_close(samples.log_prob, log_prob, rtol=1e-6, atol=1e-6)
    assert samples.passes <= length + 1  # the first block of all comes with a call for its first logits


def test_independent_tokens_take_a_pass_or_two_a_window():
    model = chain(5, 64, coupling=0.0)
    for window in (1, 8, 64):
        samples = fixed_point_sample(model, 16, window=window)
        assert torch.equal(samples.tokens, one_by_one(model, 16)[0])
        assert samples.passes <= 2 * 64 // window + 2
    assert fixed_point_sample(model, 16, window=64).passes <= 4
    right = fixed_point_sample(model, 16, window=64, guess=samples.tokens)
    assert right.passes == 2  # the first logits, and one block


def test_a_sample_does_not_depend_on_its_batch():
    model = chain(6, 30)
    ids = torch.tensor([5, 2**40, -1, 9])
    together = fixed_point_sample(model, 4, ids=ids, seed=3)
    for row in (2, 0):
        alone = fixed_point_sample(model, 1, ids=ids[row : row + 1], seed=3)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.log_prob[0] == together.log_prob[row]


def test_broken_logits_are_named_by_their_sample():
    model = chain(4, 10, coupling=0.0)
    model.table[:, 2] = math.nan
    with pytest.raises(RuntimeError, match="sample 7 met logits that are no distribution"):
        fixed_point_sample(model, 1, ids=torch.tensor([7]), prefix=torch.tensor([[2, 2]]))
    # Broken logits after a wrong guess do no harm.
    model.table[:, 2] = 0
    tokens = one_by_one(model, 1)[0]
    model.table[3] = math.nan
    wrong = torch.full_like(tokens, 3)
    if not (tokens == 3).any():
        assert torch.equal(fixed_point_sample(model, 1, guess=wrong).tokens, tokens)


def test_refuses_in_one_sentence():
    model = chain(4, 10)
    for message, options in {
        "window is 0, but expected at least 1": {"window": 0},
        "ids has shape (3,), but expected (2,)": {"ids": torch.arange(3)},
        "ids has dtype torch.float32": {"ids": torch.zeros(2)},
        "prefix has shape (3, 1), but expected (2, 1)": {"prefix": torch.zeros(3, 1, dtype=torch.int64)},
        "prefix has 11 tokens, but expected at most 10": {"prefix": torch.zeros(2, 11, dtype=torch.int64)},
        "guess has shape (2, 9), but expected (2, 10)": {"guess": torch.zeros(2, 9, dtype=torch.int64)},
        "guess has dtype torch.float32, but expected torch.int64": {"guess": torch.zeros(2, 10)},
        "guess has the value 9, but expected 0 to 3": {"guess": torch.full((2, 10), 9)},
        "prefix has the value 9, but expected 0 to 3": {"prefix": torch.full((2, 3), 9)},
        "prefix has the value -1, but expected 0 to 3": {"prefix": torch.tensor([[0, 1], [3, -1]])},
        "prefix is a list, but expected a tensor": {"prefix": [[0], [1]]},
        "ids is a list, but expected a tensor": {"ids": [0, 1]},
        "window is 1.5, but expected an int of at least 1": {"window": 1.5},
        "n is -1, but expected at least 0": {"n": -1},
        "n is 2.0, but expected an int of at least 0": {"n": 2.0},
    }.items():
        with pytest.raises((ValueError, TypeError)) as error:
            fixed_point_sample(model, **{"n": 2, **options})
        assert message in str(error.value)


def test_tokens_on_a_device_are_looked_at_too(monkeypatch):
    # These ways wait for the device after each pass, and an index out of range there would end the process.
    monkeypatch.setattr("pygen.autoregressive.arguments.can_read", lambda tensor: False)
    for name, tokens in {"prefix": torch.full((2, 3), 9), "guess": torch.full((2, 10), 9)}.items():
        with pytest.raises(ValueError, match=f"{name} has the value 9, but expected 0 to 3"):
            fixed_point_sample(chain(4, 10), 2, **{name: tokens})


def test_works_on_the_models_of_the_library():
    """The token transformer's cache, and a model that computes all anew; in float64, where blocks round alike."""
    torch.set_default_dtype(torch.float64)
    try:
        for model in (
            TokenTransformer(TokenTransformerConfig(shape=(1, 4, 4), levels=5, classes=3, width=16, layers=2, heads=2)),
            MaskedAutoencoder(MADEConfig(shape=(1, 3, 3), levels=4, classes=3)),
        ):
            model.eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
            condition = torch.tensor([0, 2, 1])
            x = model.sample(3, ids=torch.tensor([4, 5, 6]), condition=condition, seed=9)
            samples = fixed_point_sample(model, 3, ids=torch.tensor([4, 5, 6]), condition=condition, seed=9, window=6)
            assert torch.equal(samples.tokens, model.tokens(x))
            torch.testing.assert_close(samples.log_prob, model.log_prob(x, condition=condition))
    finally:
        torch.set_default_dtype(torch.float32)

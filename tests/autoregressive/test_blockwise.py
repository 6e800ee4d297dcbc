"""Blockwise parallel decoding: the samples of the loop token by token, in fewer passes once the heads have learned."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markov import MarkovNetwork, one_by_one

from pygen.autoregressive import TokenTransformer, TokenTransformerConfig
from pygen.autoregressive.blockwise import BlockwiseHeads, BlockwiseModel, blockwise_sample


def network(vocabulary: int, length: int, ahead: int, spread: float = 1.0) -> BlockwiseModel:
    model = MarkovNetwork(vocabulary, 16, length)
    model.output.weight.data *= spread
    heads = BlockwiseHeads(16, ahead)
    for layer in heads.layers:
        torch.nn.init.normal_(layer[2].weight, std=0.3)
    return BlockwiseModel(model, heads, model.output)


@given(
    st.integers(0, 4), st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.integers(0, 6),
    st.sampled_from([{}, {"temperature": 0.6, "top_k": 3}, {"temperature": 0.0}]), st.integers(0, 2**30),
)  # fmt: skip
def test_samples_are_those_of_the_loop(n, length, vocabulary, ahead, given_tokens, filters, seed):
    torch.manual_seed(seed)
    model = network(vocabulary, length, ahead, spread=3)
    ids = torch.randint(-(2**40), 2**40, (n,))
    prefix = torch.randint(vocabulary, (n, min(given_tokens, length)))
    tokens, log_prob = one_by_one(model.model, n, ids=ids, seed=seed, prefix=prefix, **filters)
    samples = blockwise_sample(model, n, ids=ids, seed=seed, prefix=prefix, **filters)
    assert torch.equal(samples.tokens, tokens)
    torch.testing.assert_close(samples.log_prob, log_prob, rtol=1e-5, atol=1e-5)
    assert samples.passes <= length + 1


def test_trained_heads_save_passes():
    """A chain that nearly always goes to the next number: after training, the heads know what comes."""
    model = network(5, 50, ahead=3)
    chain = model.model
    with torch.no_grad():  # features: the last token; logits: the one after it
        chain.embed.weight.zero_()
        for before in range(5):
            for last in range(5):
                chain.embed.weight[5 * before + last, last] = 1
        chain.output.weight.zero_()
        chain.output.bias.zero_()
        for last in range(5):
            chain.output.weight[(last + 1) % 5, last] = 8
    before = blockwise_sample(model, 8, seed=1)
    tokens = before.tokens
    optimizer = torch.optim.Adam(model.heads.parameters(), lr=1e-2)
    first = float(model.loss(tokens).detach())
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3 * first
    assert all(p.grad is None for p in chain.parameters())
    after = blockwise_sample(model, 8, seed=1)
    assert torch.equal(after.tokens, tokens)
    assert after.passes < 0.6 * before.passes
    assert blockwise_sample(model, 1, seed=1, temperature=0).passes <= math.ceil(50 / 4) + 3


def test_new_heads_say_what_the_model_says():
    model = MarkovNetwork(6, 16, 12)
    heads = BlockwiseHeads(16, 3, hidden=40)
    wrapped = BlockwiseModel(model, heads, model.output)
    state = wrapped.start(2)
    tokens = torch.randint(6, (2, 4))
    logits, ahead, state = wrapped.step_ahead(tokens, state)
    assert ahead.shape == (2, 4, 3, 6)
    torch.testing.assert_close(ahead, logits[:, :, None].expand(-1, -1, 3, -1))
    assert (wrapped.length, wrapped.vocabulary, state.position) == (12, 6, 4)


def test_a_sample_does_not_depend_on_its_batch():
    model = network(6, 30, ahead=3)
    ids = torch.tensor([5, 2**40, -1, 9])
    together = blockwise_sample(model, 4, ids=ids, seed=3)
    for row in (2, 0):
        alone = blockwise_sample(model, 1, ids=ids[row : row + 1], seed=3)
        assert torch.equal(alone.tokens[0], together.tokens[row])


def test_heads_refuse_to_look_nowhere():
    with pytest.raises(ValueError, match="ahead is 0, but expected at least 1"):
        BlockwiseHeads(4, 0)


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (0, 4), (3,)])
def test_heads_that_have_nothing_to_guess_are_said_to_have_nothing(shape):
    model = network(4, 6, ahead=2)
    with pytest.raises(ValueError, match=r"tokens has shape .*: a head guesses one that comes after the next"):
        model.loss(torch.zeros(shape, dtype=torch.int64))
    assert model.loss(torch.zeros(3, 2, dtype=torch.int64)).isfinite()


def test_refuses_in_one_sentence():
    model = network(4, 6, ahead=2)
    with pytest.raises(ValueError, match="n is -1, but expected at least 0"):
        blockwise_sample(model, -1)
    with pytest.raises(ValueError, match="prefix has the value 4, but expected 0 to 3"):
        blockwise_sample(model, 2, prefix=torch.full((2, 1), 4))


def test_works_on_the_token_transformer():
    """Its cache, its guidance; in float64, where blocks and single tokens round alike."""
    torch.set_default_dtype(torch.float64)
    try:
        config = TokenTransformerConfig(
            shape=(1, 4, 4), levels=5, classes=3, width=16, layers=2, heads=2, guidance=0.5, label_dropout=0.1
        )
        model = TokenTransformer(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        wrapped = BlockwiseModel(model, BlockwiseHeads(16, 3), model.head)
        condition = torch.tensor([0, 2, 1])
        x = model.sample(3, condition=condition, seed=9)
        samples = blockwise_sample(wrapped, 3, condition=condition, seed=9)
        assert torch.equal(samples.tokens, model.tokens(x))
        loss = wrapped.loss(samples.tokens, condition=condition)
        loss.backward()
        assert all(p.grad is not None for p in wrapped.heads.parameters())
    finally:
        torch.set_default_dtype(torch.float32)

"""WaveNet on sound, and what only some recipes have: its own reach, a MADE's one forward, two ways through a row."""

from __future__ import annotations

import pytest
import torch
from autoregressive_cases import random_pictures, small
from hypothesis import given
from hypothesis import strategies as st

from pygen.autoregressive import DiagonalBiLSTM, MaskedAutoencoder, PrefixState, WaveNet


def test_wavenet_reads_as_far_back_as_it_says() -> None:
    model = small("wavenet", shape=(1, 1, 40), levels=16, classes=None).double()
    assert isinstance(model, WaveNet)
    x = random_pictures(model, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.logits(x)[0, 35].square().sum(), x)
    read = gradient.flatten().nonzero().flatten()
    assert (int(read.min()), int(read.max())) == (35 - model.config.reach, 34)


@given(length=st.integers(1, 50), n=st.integers(0, 2))
def test_wavenet_draws_sound_of_any_length(length: int, n: int) -> None:
    model = small("wavenet", shape=(1, 1, 20), levels=16, classes=3)
    tokens, log_prob = model.sample_tokens(n, length=length, seed=2)
    x = model.pictures(tokens)
    assert x.shape == (n, 1, 1, length)
    torch.testing.assert_close(model.log_prob(x, condition=torch.arange(n)).detach(), log_prob, atol=1e-4, rtol=1e-5)
    # What comes first does not depend on how much follows.
    longer, _ = model.sample_tokens(n, length=length + 5, seed=2)
    assert torch.equal(longer[:, :length], tokens)


def test_networks_of_a_few_lengths_are_kept() -> None:
    model = small("wavenet", shape=(1, 1, 20), levels=16, classes=None)
    lengths = [*range(1, 12), 3]
    first = [model.sample_tokens(1, length=length)[0] for length in lengths]
    assert all(torch.equal(a, first[-2][:, : a.shape[1]]) for a in first)
    assert model.converted(3) is model.converted(3)


@pytest.mark.parametrize("length", [0, -3])
@pytest.mark.parametrize("name", ["wavenet", "transformer"])
def test_a_sample_of_no_length_is_refused(name: str, length: int) -> None:
    model = small(name, shape=(1, 1, 20), levels=16, classes=None)
    for refused in (model.start, model.sample_tokens):
        with pytest.raises(ValueError, match=f"length is {length}, but expected at least 1"):
            refused(2, length=length)


def test_wavenet_goes_on_from_sound() -> None:
    model = small("wavenet", shape=(1, 1, 20), levels=16, classes=None)
    tokens, _ = model.sample_tokens(2, length=30, seed=2)
    x, known = model.pictures(tokens), torch.arange(30) < 12
    assert torch.equal(model.complete(x.masked_fill(~known, 0), known, seed=2), x)
    loss = model.loss(x)
    torch.testing.assert_close(loss, -model.log_prob(x).mean() / 30)
    with pytest.raises(ValueError, match="x has no pictures, but expected at least one"):
        model.loss(x[:0])
    with pytest.raises(ValueError, match=r"x has shape \(2, 2, 1, 30\)"):
        model.log_prob(x.expand(-1, 2, -1, -1))


def test_a_length_that_is_no_int_is_named() -> None:
    model = small("wavenet", shape=(1, 1, 20), levels=16, classes=None)
    for refused in (model.start, model.sample_tokens):
        with pytest.raises(TypeError, match="length is 5.5, but expected an int of at least 1"):
            refused(2, length=5.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 0\), but expected \(n, 1\)"):
        model.token_log_prob(torch.zeros(2, 0, dtype=torch.int64))


@pytest.mark.parametrize("degrees", ["random", "sequential"])
@pytest.mark.parametrize("layers", [1, 3])
def test_made_completes_each_unit_once(degrees: str, layers: int) -> None:
    model = small("made", shape=(1, 3, 4), levels=5, classes=3, degrees=degrees, layers=layers)
    assert isinstance(model, MaskedAutoencoder)
    x, labels = random_pictures(model, 2), torch.tensor([2, 0])
    state = model.start(2, condition=labels)
    for units in state.units:
        assert sorted(torch.cat(units).tolist()) == list(range(40))
    prefix = PrefixState(model, 2, labels)
    for token in (None, *model.tokens(x)[:, :-1].unbind(1)):
        logits, state = model.step(token, state)
        expected, prefix = model.step(token, prefix)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_diagonal_way_from_the_right_is_read_a_row_later() -> None:
    # Without the first convolution's reach, only that way brings the upper right to the left.
    model = small("diagonal-bilstm", shape=(1, 3, 12), levels=3, classes=None, first_kernel_size=3).double()
    assert isinstance(model, DiagonalBiLSTM)
    x = random_pictures(model, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.logits(x)[0, 12].square().sum(), x)
    assert (gradient[0, 0, 0, 5:11] != 0).all()
    assert not gradient[0, 0, 1:].any()

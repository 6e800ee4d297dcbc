"""The token transformer: guidance, codes, and pictures in the colours of a palette."""

from __future__ import annotations

import pytest
import torch
from autoregressive_cases import random_pictures, small
from hypothesis import given
from hypothesis import strategies as st

from pygen.autoregressive import TokenTransformer, fit_palette
from pygen.autoregressive.palette import nearest_colour


def test_guidance_goes_away_from_the_prediction_without_label() -> None:
    model = small("transformer", shape=(1, 3, 4), levels=5, classes=3)
    x, labels = random_pictures(model, 4), torch.tensor([0, 2, 1, 0])
    tokens = model.tokens(x)
    labelled = model.logits(x, condition=labels).log_softmax(2).detach()
    assert isinstance(model, TokenTransformer)
    unlabelled = model._logits(tokens, torch.full((4,), 3)).log_softmax(2).detach()
    assert not torch.allclose(labelled, unlabelled, atol=1e-3)
    expected = labelled + 1.5 * (labelled - unlabelled)
    state = model.start(4, condition=labels, guidance=1.5)
    first, state = model.step(None, state)
    torch.testing.assert_close(first, expected[:, 0], atol=1e-4, rtol=1e-4)
    logits, state = model.step(tokens[:, :6], state)
    torch.testing.assert_close(logits, expected[:, 1:7], atol=1e-4, rtol=1e-4)
    # Both halves of the cache are cropped, forked and reordered.
    state.crop(2)
    forked = state.fork(2)
    forked.reorder(torch.tensor([7, 2]))
    logits, forked = model.step(tokens[[3, 1], 2:5], forked)
    torch.testing.assert_close(logits, expected[[3, 1], 3:6], atol=1e-4, rtol=1e-4)
    logits, state = model.step(tokens[:, 2], state)
    torch.testing.assert_close(logits, expected[:, 3], atol=1e-4, rtol=1e-4)


def test_samples_are_guided_by_the_argument_or_the_configuration() -> None:
    plain = small("transformer", shape=(1, 3, 4), levels=5, classes=3)
    guided = small("transformer", shape=(1, 3, 4), levels=5, classes=3, guidance=3.0)
    guided.load_state_dict(plain.state_dict())
    assert torch.equal(guided.sample(6), plain.sample(6, guidance=3.0))
    assert torch.equal(guided.sample(6, guidance=0.0), plain.sample(6))
    assert not torch.equal(guided.sample(6), plain.sample(6))
    known = torch.zeros(3, 4, dtype=torch.bool)
    assert torch.equal(guided.complete(torch.zeros(6, 1, 3, 4), known, condition=torch.arange(6) % 3), guided.sample(6))
    with pytest.raises(ValueError, match="guidance is -1.0"):
        plain.sample(1, guidance=-1.0)


def test_training_withholds_labels() -> None:
    model = small("transformer", shape=(1, 2, 2), levels=3, classes=2, label_dropout=0.5).train()
    assert isinstance(model, TokenTransformer)
    x, labels = random_pictures(model, 64), torch.arange(64) % 2
    model.loss(x, condition=labels).backward()
    assert model.transformer.label is not None
    gradient = model.transformer.label.weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()  # both labels, and none
    model.zero_grad()
    model.eval().loss(x, condition=labels).backward()
    gradient = model.transformer.label.weight.grad
    assert gradient is not None
    assert not gradient[2].any()


def test_codes_are_a_picture_of_one_channel() -> None:
    model = small("transformer", shape=(1, 1, 10), levels=1024, classes=None)
    codes = torch.randint(1024, (3, 10))
    assert torch.equal(model.tokens(model.pictures(codes)), codes)
    torch.testing.assert_close(model.token_log_prob(codes), model.log_prob(model.pictures(codes)))
    drawn, log_prob = model.sample_tokens(3, seed=1)
    torch.testing.assert_close(model.token_log_prob(drawn).detach(), log_prob, atol=1e-4, rtol=1e-5)


def coloured(n: int) -> torch.Tensor:
    """Pictures (n, 3, 4, 4) of 9 levels whose pixels have one of four colours."""
    colours = torch.tensor([[-1.0, -1.0, 1.0], [1.0, 0.5, -0.25], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    index = torch.randint(4, (n, 4, 4), generator=torch.Generator().manual_seed(0))
    return colours[index].movedim(-1, 1)


def test_a_palette_makes_one_token_of_a_pixel() -> None:
    model = small("transformer", shape=(3, 4, 4), levels=9, classes=None, palette=4).train()
    assert isinstance(model, TokenTransformer)
    assert (model.length, model.vocabulary) == (16, 4)
    x = coloured(5)
    model.loss(x)  # the first batch gives the palette
    model.eval()
    assert torch.equal(model.pictures(model.tokens(x)), x)
    chosen = model.palette
    assert chosen is not None
    before = chosen.clone()
    model.train().loss(-x)
    assert torch.equal(chosen, before), "only the first batch gives the palette"
    copy = TokenTransformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.sample(2), model.eval().sample(2))
    assert bool(copy.chosen)

    sample, log_prob = model.sample_with_log_prob(4, seed=1)
    pixels = sample.movedim(1, -1).reshape(-1, 1, 3)
    assert (pixels == before).all(-1).any(-1).all(), "samples have the colours of the palette"
    torch.testing.assert_close(model.log_prob(sample).detach(), log_prob, atol=1e-4, rtol=1e-5)
    known = torch.arange(16).reshape(4, 4) < 7
    completed = model.complete(sample.where(known, 0.1), known, seed=1)
    assert torch.equal(completed, sample)
    stages = model.trajectory(2, seed=1)
    assert len(stages) == 17
    assert torch.equal(stages[-1].values, model.sample(2, seed=1))
    with pytest.raises(ValueError, match="palette is None in the configuration"):
        TokenTransformer().choose_palette(x)


@given(colours=st.integers(1, 6), channels=st.integers(1, 3), n=st.integers(1, 30), seed=st.integers(0, 9))
def test_the_palette_is_where_kmeans_stops(colours: int, channels: int, n: int, seed: int) -> None:
    pictures = torch.rand(n, channels, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    palette = fit_palette(pictures, colours, iterations=200, seed=seed)
    assert palette.shape == (colours, channels)
    pixels = pictures.movedim(1, -1).reshape(-1, channels)
    nearest = nearest_colour(pixels, palette)
    for colour in range(colours):
        own = pixels[nearest == colour]
        if len(own):
            torch.testing.assert_close(palette[colour], own.mean(0), atol=1e-5, rtol=1e-5)


def test_few_colours_are_all_in_the_palette() -> None:
    x = coloured(8)
    for colours in (4, 7):
        palette = fit_palette(x, colours)
        pixels = x.movedim(1, -1).reshape(-1, 3)
        assert torch.equal(palette[nearest_colour(pixels, palette)], pixels)
    with pytest.raises(ValueError, match="colours is 0"):
        fit_palette(x, 0)
    with pytest.raises(ValueError, match=r"pictures has shape \(0, 3, 4, 4\)"):
        fit_palette(x[:0], 4)
    model = small("transformer", shape=(3, 4, 4), levels=9, classes=None, palette=4)
    assert isinstance(model, TokenTransformer)
    x[1, 2, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="pictures has values that are NaN or infinite"):
        model.choose_palette(x)
    assert not bool(model.chosen)


def test_a_palette_is_of_exact_levels_in_float64_too() -> None:
    model = small("transformer", shape=(3, 4, 4), levels=10, classes=None, palette=4).double()
    assert isinstance(model, TokenTransformer)
    x = model.sample(2, seed=1)
    assert torch.equal(model.dequantize(model.quantize(x)), x)
    assert torch.equal(model.complete(x, torch.arange(4) < 2, seed=1), x)

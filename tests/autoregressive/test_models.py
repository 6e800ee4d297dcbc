"""What every autoregressive recipe keeps to: causality, one density in full and step by step, states that can be
cropped, forked and reordered, samples that are their ids, completion."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from autoregressive_cases import MIXTURES, SMALL_RECIPES, random_pictures, small
from hypothesis import given, settings
from hypothesis import strategies as st

from pygen import ops
from pygen.autoregressive import AutoregressiveModel
from pygen.model import Density
from pygen.workbench.families import model_class

RECIPES = list(SMALL_RECIPES)
CONVERTED = [recipe for recipe in RECIPES if model_class("autoregressive", recipe).convolutional]  # type: ignore[attr-defined]
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@every_recipe
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 2, 4)])
def test_an_element_depends_on_none_that_comes_later(recipe: str, shape: tuple[int, int, int]) -> None:
    model = small(recipe, shape=shape, levels=4, classes=None).double()
    x = random_pictures(model, 3)
    tokens = model.tokens(x)
    logits = model.logits(x).detach()
    for i in range(model.length):
        # Everything from token i on is another; the logits up to i must not notice.
        other = torch.where(torch.arange(model.length) >= i, (tokens + 1) % 4, tokens)
        changed = model.logits(model.pictures(other)).detach()
        difference = (changed - logits).abs().amax((0, 2))
        assert (difference[: i + 1] < 1e-13).all(), f"element {i} or one before it reads a later one"
        assert i + 1 == model.length or (difference > 1e-9).any(), f"none reads element {i}"


@every_recipe
def test_the_probabilities_of_all_pictures_sum_to_one(recipe: str) -> None:
    shape, levels = ((3, 1, 1), 3) if recipe == "made" else ((1, 2, 2), 3)
    if recipe == "pixelcnn++":
        shape = (1, 2, 2)
    model = small(recipe, 2.0, shape=shape, levels=levels, classes=3).double()
    every = torch.tensor(list(itertools.product(range(levels), repeat=model.length)))
    by_label = []
    for label in range(3):
        probability = model.token_log_prob(every, condition=torch.full((len(every),), label)).exp().detach()
        assert probability.sum().item() == pytest.approx(1, abs=1e-9)
        by_label.append(probability)
    assert (by_label[0] - by_label[1]).abs().max() > 1e-5
    assert model.density is Density.EXACT


@every_recipe
def test_samples_have_the_probabilities_that_log_prob_says(recipe: str) -> None:
    model = small(recipe, 0.6, shape=(1, 2, 2), levels=2, classes=None)
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    expected = model.token_log_prob(every).exp().detach() * 4000
    tokens, _ = model.sample_tokens(4000, seed=11)
    counted = torch.bincount((tokens * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16)
    large = expected > 10
    statistic = ((counted - expected).square() / expected)[large].sum().item()
    assert large.sum() > 3
    assert statistic < 45  # chi-square with at most 15 degrees of freedom exceeds it once in 10^4


@given(
    recipe=st.sampled_from(RECIPES), channels=st.integers(1, 3), height=st.integers(1, 3), width=st.integers(1, 3),
    levels=st.sampled_from([2, 5, 256]), n=st.integers(0, 3), labelled=st.booleans(),
)  # fmt: skip
def test_drawing_agrees_with_the_full_forward(
    recipe: str, channels: int, height: int, width: int, levels: int, n: int, labelled: bool
) -> None:
    if recipe in MIXTURES and channels == 2:
        channels = 3
    if recipe == "pixelcnn++":
        height, width = 2 * height, 2 * width
    model = small(recipe, shape=(channels, height, width), levels=levels, classes=4 if labelled else None)
    labels = torch.arange(n) % 4 if labelled else None
    x, log_prob = model.sample_with_log_prob(n, seed=3)
    assert x.shape == (n, channels, height, width)
    assert torch.equal(model.dequantize(model.quantize(x)), x)
    torch.testing.assert_close(log_prob, model.log_prob(x, condition=labels).detach(), atol=1e-4, rtol=1e-5)


@functools.cache
def of_two_rows(recipe: str, colours: int, program: bool) -> AutoregressiveModel:
    """A model of small pictures, converted once, or without its program as on a device that has none."""
    model = small(recipe, shape=(colours, 2, 4), levels=5, classes=3)
    if not program:
        model.converted = lambda length=None: None  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("recipe", "program"), [(r, False) for r in RECIPES] + [(r, True) for r in RECIPES if r in CONVERTED]
)
@settings(max_examples=10)
@given(colours=st.sampled_from([1, 3]), data=st.data())
def test_any_way_through_a_state_gives_the_logits_of_the_full_forward(
    recipe: str, program: bool, colours: int, data: st.DataObject
) -> None:
    model = of_two_rows(recipe, colours, program)
    x, labels = random_pictures(model, 3), torch.tensor([2, 0, 1])
    tokens, full = model.tokens(x), model.logits(x, condition=labels).detach()
    rows = torch.arange(3)
    state = model.start(3, condition=labels)
    others = []
    for _ in range(data.draw(st.integers(3, 8), label="moves")):
        move = data.draw(st.sampled_from(["feed", "feed", "feed", "crop", "fork", "reorder"]), label="move")
        if move == "feed":
            most = model.length - 1 - state.position
            block = data.draw(st.integers(0, most), label="block")
            begin, end = state.position, state.position + block
            if begin == 0 and data.draw(st.booleans(), label="first"):
                logits, state = model.step(None, state)
                torch.testing.assert_close(logits, full[rows, 0], atol=1e-5, rtol=1e-5)
            logits, state = model.step(tokens[rows, begin:end], state)
            assert state.position == end
            torch.testing.assert_close(logits, full[rows, begin + 1 : end + 1], atol=1e-5, rtol=1e-5)
        elif move == "crop":
            state.crop(data.draw(st.integers(0, state.position), label="position"))
        elif move == "fork":
            copies = data.draw(st.integers(0, 2), label="copies")
            others.append((state, rows, state.position))
            state, rows = state.fork(copies), rows.repeat_interleave(copies)
        else:
            index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=3), label="index") if len(rows) else []
            state.reorder(torch.tensor(index, dtype=torch.int64))
            rows = rows[torch.tensor(index, dtype=torch.int64)]
        assert state.rows == len(rows)
    for state, rows, position in others:  # what happened to a fork did not happen to what it was forked from
        assert state.position == position
        if position + 1 < model.length:
            logits, _ = model.step(tokens[rows, position], state)
            torch.testing.assert_close(logits, full[rows, position + 1], atol=1e-5, rtol=1e-5)


@every_recipe
def test_a_replay_after_a_crop_gives_the_same_bits(recipe: str) -> None:
    model = small(recipe, shape=(1, 4, 4), levels=5, classes=None)
    tokens = model.tokens(random_pictures(model, 2))
    state = model.start(2)
    seen = []
    for i in range(model.length - 1):
        logits, state = model.step(tokens[:, i], state)
        seen.append(logits)
    state.crop(3)
    for i in range(3, model.length - 1):
        logits, state = model.step(tokens[:, i], state)
        assert torch.equal(logits, seen[i])


@pytest.mark.parametrize("recipe", CONVERTED)
def test_the_bits_do_not_depend_on_how_many_tokens_are_fed_at_once(recipe: str) -> None:
    model = small(recipe, shape=(3, 2, 4), levels=9, classes=None)
    tokens, state = model.tokens(random_pictures(model, 5)), model.start(5)
    whole, state = model.step(tokens[:, :-1], state)
    for block in (1, 2, 7):
        state.crop(0)
        parts = [model.step(part, state)[0] for part in tokens[:, :-1].split(block, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    state.crop(4)
    forked = state.fork(3)
    logits, _ = model.step(tokens[:, 4:11].repeat_interleave(3, 0), forked)
    assert torch.equal(logits, whole[:, 4:11].repeat_interleave(3, 0))


@every_recipe
def test_in_float64_steps_and_draws_have_the_probability_of_log_prob(recipe: str) -> None:
    model = small(recipe, shape=(3, 2, 4), levels=10, classes=None).double()
    x, drawn = model.sample_with_log_prob(3, seed=1)
    assert x.dtype == torch.float64
    tokens, expected = model.tokens(x), model.log_prob(x).detach()
    torch.testing.assert_close(drawn, expected, atol=1e-11, rtol=1e-11)
    state = model.start(3)
    first, state = model.step(None, state)
    rest, state = model.step(tokens[:, :-1], state)
    by_step = torch.cat((first[:, None], rest), 1).log_softmax(2).gather(2, tokens[:, :, None])[..., 0].sum(1)
    torch.testing.assert_close(by_step.detach(), expected, atol=1e-11, rtol=1e-11)


@every_recipe
def test_bad_steps_are_named(recipe: str) -> None:
    model = small(recipe, shape=(1, 2, 2), levels=3, classes=None)
    state = model.start(2)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="token has dtype torch.float32"):
        model.step(tokens.float(), state)
    with pytest.raises(ValueError, match=r"token has shape \(3,\), but expected \(2,\)"):
        model.step(torch.zeros(3, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="token has 4 tokens after 0, but expected at most 3 in all"):
        model.step(torch.zeros(2, 4, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="position is 1, but expected 0 to 0"):
        state.crop(1)
    with pytest.raises(ValueError, match="copies is -1"):
        state.fork(-1)
    with pytest.raises(ValueError, match="index has rows 0 to 2, but expected rows of 0 to 1"):
        state.reorder(torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="index has dtype"):
        state.reorder(torch.tensor([0.0]))
    for value in (3, -1):
        with pytest.raises(ValueError, match=f"token has the value {value}, but expected 0 to 2"):
            model.step(torch.tensor([[0, 1], [2, value]]), state)
    assert state.position == 0
    with pytest.raises(TypeError, match="token is a int, but expected a tensor"):
        model.step(1, state)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="n is 2.0, but expected an int"):
        model.start(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"index has shape \(1, 1\)"):
        state.reorder(torch.tensor([[0]]))
    _, state = model.step(tokens, state)
    with pytest.raises(ValueError, match="token is None, but expected int64 tokens at position 3"):
        model.step(None, state)
    with pytest.raises(ValueError, match="n is -1"):
        model.start(-1)
    with pytest.raises(ValueError, match="guidance is 1.0, but expected 0"):
        model.start(2, guidance=1.0)
    if recipe != "wavenet":
        with pytest.raises(ValueError, match="length is 9, but expected 4"):
            model.start(2, length=9)


@every_recipe
def test_a_sample_is_its_id_whatever_the_batch(recipe: str) -> None:
    model = small(recipe, shape=(1, 4, 4), levels=5, classes=10)
    whole = model.sample(12, seed=5)
    ids = torch.tensor([7, 0, 11])
    assert torch.equal(model.sample(3, ids=ids, seed=5), whole[ids])
    assert torch.equal(model.sample(3, ids=ids, condition=ids % 10, seed=5), whole[ids])
    assert not torch.equal(model.sample(12, seed=6), whole)
    assert not torch.equal(model.sample(3, ids=ids, condition=(ids + 1) % 10, seed=5), whole[ids])
    assert not whole.is_inference()


@every_recipe
def test_greedy_and_filtered_sampling(recipe: str) -> None:
    model = small(recipe, 1.0, shape=(1, 2, 4), levels=5, classes=None)
    greedy = model.sample(3, seed=1, temperature=0.0)
    assert torch.equal(greedy, model.sample(3, seed=2, top_k=1))
    assert torch.equal(greedy[:1].expand_as(greedy), greedy)
    _, log_prob = model.sample_with_log_prob(3, seed=2, top_p=0.5)
    assert (log_prob <= 0).all()
    best = model.logits(greedy).argmax(2)
    assert torch.equal(model.tokens(greedy), best)


@every_recipe
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 4)])
def test_trajectory_turns_uniform_numbers_into_the_sample(recipe: str, shape: tuple[int, int, int]) -> None:
    model = small(recipe, shape=shape, levels=5, classes=10)
    _, height, width = shape
    ids = torch.tensor([3, 8])
    stages = model.trajectory(2, ids=ids, seed=-1)
    z, x = stages[0].values, stages[-1].values
    assert torch.equal(x, model.sample(2, ids=ids, seed=-1))
    assert (stages[0].label, stages[-1].label) == ("Z", "X")
    assert len(stages) == 1 + height * width
    for i, stage in enumerate(stages):
        done = (torch.arange(height * width) < i).reshape(height, width).expand_as(x)
        assert torch.equal(stage.values, torch.where(done, x, z))
    if recipe in MIXTURES:
        return
    # Z decides X: each level is where u falls in the cumulative distribution given what came before.
    cumulative = model.logits(x, condition=ids).softmax(2).cumsum(2)
    u = (z.movedim(1, -1).flatten(1) + 1) / 2
    level = (cumulative <= u[:, :, None]).sum(2)
    assert torch.equal(level, model.tokens(x))


@every_recipe
def test_completion_keeps_what_is_known_and_draws_the_rest(recipe: str) -> None:
    model = small(recipe, shape=(1, 6, 6), levels=5, classes=10)
    whole = model.sample(4, seed=9)
    labels = torch.arange(4)
    known = torch.zeros(6, 6, dtype=torch.bool)
    known[:3] = True
    # The same seed draws the same rest, because every element's number is its own.
    hidden = torch.where(known, whole, 0.25)
    assert torch.equal(model.complete(hidden, known, condition=labels, seed=9), whole)
    other = model.complete(hidden, known, condition=labels, seed=10)
    assert torch.equal(other[:, :, :3], whole[:, :, :3])
    assert not torch.equal(other, whole)
    # Other elements known in each picture, not only the first.
    mixed = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mixed[0], mixed[1] = True, False
    filled = model.complete(hidden.masked_fill(~mixed, 0), mixed, condition=labels, seed=9)
    assert torch.equal(filled[mixed], model.dequantize(model.quantize(hidden))[mixed])
    assert torch.equal(filled[1], whole[1])
    coloured = small(recipe, shape=(3, 2, 4), levels=5, classes=10)
    picture = coloured.sample(2, seed=9)
    known = torch.arange(24).reshape(3, 2, 4) % 5 < 2  # other pixels of each colour
    completed = coloured.complete(picture.where(known, 0.25), known, condition=torch.arange(2), seed=9)
    assert torch.equal(completed, picture)
    with pytest.raises(TypeError, match="known has dtype"):
        model.complete(whole, known.float())
    with pytest.raises(ValueError, match=r"known has shape \(5,\)"):
        model.complete(whole, torch.ones(5, dtype=torch.bool))


@every_recipe
def test_what_is_not_known_may_be_nan(recipe: str) -> None:
    model = small(recipe, shape=(1, 2, 4), levels=5, classes=None)
    x, known = model.sample(3, seed=1), torch.arange(4) < 2
    assert torch.equal(model.complete(x.masked_fill(~known, torch.nan), known, seed=1), x)
    with pytest.raises(ValueError, match="x is NaN where it is known"):
        model.complete(x.masked_fill(known, torch.nan), known, seed=1)


@every_recipe
def test_nan_in_a_picture_is_refused_or_stays_in_its_row(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(recipe, shape=(1, 2, 4), levels=5, classes=None)
    x = random_pictures(model, 3)
    broken = x.clone()
    broken[1, 0, 1, 2] = torch.nan
    for refusing in (model.log_prob, model.loss, model.tokens):
        with pytest.raises(ValueError, match="x has values that are NaN"):
            refusing(broken)
    # On a GPU, where to look would be to wait.
    monkeypatch.setattr("pygen.autoregressive.arguments.can_read", lambda tensor: False)
    log_prob, expected = model.log_prob(broken).detach(), model.log_prob(x).detach()
    assert log_prob.isnan().tolist() == [False, True, False]
    assert torch.equal(log_prob[[0, 2]], expected[[0, 2]])
    assert model.loss(broken).isnan()


@every_recipe
def test_bad_tokens_are_named(recipe: str) -> None:
    model = small(recipe, shape=(1, 2, 2), levels=3, classes=None)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    for refusing in (model.token_log_prob, model.token_logits):
        with pytest.raises(TypeError, match="tokens has dtype torch.float32, but expected torch.int64"):
            refusing(tokens.float())
        with pytest.raises(TypeError, match="tokens is a list, but expected a tensor"):
            refusing([[0, 0, 0, 0]])  # type: ignore[arg-type]
        for wrong in (tokens[:, :3], tokens[0], tokens[:, :, None]):
            with pytest.raises(ValueError, match=r"tokens has shape .*, but expected \(n, 4\)"):
                refusing(wrong)
        for value in (3, -1):
            with pytest.raises(ValueError, match=f"tokens has the value {value}, but expected 0 to 2"):
                refusing(tokens.index_fill(1, torch.tensor([2]), value))


@every_recipe
def test_bad_filters_and_seeds_are_refused_before_anything_is_done(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(recipe, shape=(1, 2, 2), levels=3, classes=None)

    def at_work(*_: Any, **__: Any) -> None:
        raise AssertionError("it has begun")

    monkeypatch.setattr(model, "start", at_work)
    monkeypatch.setattr(model, "converted", at_work)
    x, known = torch.zeros(2, 1, 2, 2), torch.ones(2, dtype=torch.bool)
    for wrong in (
        {"temperature": -1.0}, {"top_k": 0}, {"top_k": 1.5}, {"top_p": 1.5}, {"min_p": 2.0}, {"typical_p": 0.0},
        {"seed": 2**64}, {"seed": 2**65}, {"seed": -(2**63) - 1}, {"seed": 1.5},
    ):  # fmt: skip
        plain: dict[str, Any] = {"seed": 0, "sample_ids": torch.arange(2), "position": 0}
        with pytest.raises((ValueError, TypeError)) as expected:
            ops.sample_logits(torch.zeros(2, 3), **{**plain, **wrong})
        for draw in (functools.partial(model.sample, 2), functools.partial(model.complete, x, known)):
            with pytest.raises(expected.type) as error:
                draw(**wrong)
            assert str(error.value) == str(expected.value)
    with pytest.raises(ValueError, match="guidance is -1.0, but expected"):
        model.sample(2, guidance=-1.0)


@every_recipe
def test_in_training_it_draws_as_in_evaluation(recipe: str) -> None:
    options = {"dropout": 0.5} if recipe not in ("wavenet", "made") else {}
    model = small(recipe, 1.0, shape=(1, 4, 4), levels=5, classes=None, **options)
    known = torch.arange(4) < 2
    prefix = torch.tensor([[0, 4, 2], [1, 1, 3]])

    def draw() -> list[torch.Tensor]:
        x, log_prob = model.sample_with_log_prob(4, seed=1)
        first, state = model.step(None, model.start(2))
        logits, state = model.step(prefix, state)
        return [x, log_prob, model.complete(x, known, seed=2), model.trajectory(2, seed=1)[-1].values, first, logits]

    expected = draw()
    model.train()
    frozen = list(model.modules())[-1].eval()  # a layer that the user keeps as it is
    for ours, theirs in zip(draw(), expected, strict=True):
        assert torch.equal(ours, theirs)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    model.converted = lambda length=None: None  # type: ignore[method-assign]
    with pytest.raises(Stop):
        model.sample(2, progress=stop)
    assert [module for module in model.modules() if not module.training] == [frozen]


@every_recipe
def test_progress_is_told(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(recipe, shape=(1, 2, 2), levels=3, classes=None)
    told: list[tuple[int, int]] = []
    x = model.sample(2, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4)
    assert told == sorted(told)
    assert torch.equal(model.sample(2, progress=True), x)
    captured = capsys.readouterr()
    assert "4/4 tokens 100%" in captured.err
    assert not captured.out
    assert torch.equal(model.sample(2), x)
    assert not capsys.readouterr().err


@every_recipe
def test_loss_is_the_mean_per_token_and_decreases(recipe: str) -> None:
    model = small(recipe, 0.1, shape=(1, 4, 4), levels=5, classes=10).train()
    x = torch.full((16, 1, 4, 4), -1.0)
    x[:, :, 1:3, 1:3] = 1.0
    labels = torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(x, condition=labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    expected = -model.log_prob(x, condition=labels).mean() / 16
    torch.testing.assert_close(model.loss(x, condition=labels), expected)


@every_recipe
def test_sampling_follows_a_change_of_the_parameters(recipe: str) -> None:
    model = small(recipe, 2.0, shape=(1, 4, 4), levels=5, classes=None)
    before = model.sample(4, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    after, log_prob = model.sample_with_log_prob(4, seed=1)
    assert not torch.equal(before, after)
    torch.testing.assert_close(log_prob, model.log_prob(after).detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("recipe", CONVERTED)
@pytest.mark.parametrize("colours", [1, 3])
def test_a_converted_network_draws_what_the_network_itself_draws(
    recipe: str, colours: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64 no draw is so near to an edge that rounding decides it.
    model = small(recipe, shape=(colours, 4, 4), levels=5, classes=3).double().to(device)
    ids, labels = torch.tensor([4, 1, 2**40], device=device), torch.tensor([2, 0, 1], device=device)
    known = torch.rand(3, colours, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    given = random_pictures(model, 3)

    def draw() -> list[torch.Tensor]:
        x, log_prob = model.sample_with_log_prob(3, ids=ids, condition=labels, seed=7)
        cold = model.sample(3, ids=ids, condition=labels, seed=7, temperature=0.5, top_k=3)
        completed = model.complete(given, known, ids=ids, condition=labels, seed=7)
        return [x, cold, completed, model.trajectory(3, ids=ids, condition=labels, seed=7)[-1].values, log_prob]

    converted = model.converted()
    assert converted is not None
    assert converted.device == model.device
    by_program = draw()
    monkeypatch.setattr(model, "converted", lambda length=None: None)
    by_network = draw()
    for ours, theirs in zip(by_program[:-1], by_network[:-1], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(by_program[-1], by_network[-1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("recipe", CONVERTED)
def test_a_network_is_converted_again_only_when_a_parameter_changes(
    recipe: str, backend: str, device: torch.device
) -> None:
    model = small(recipe, shape=(1, 4, 4), levels=5, classes=None).to(device)
    first = model.converted()
    model.sample(1)
    assert model.converted() is first
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2)
    assert model.converted() is not first


@pytest.mark.parametrize("recipe", CONVERTED)
def test_a_write_to_one_element_that_moves_no_version_is_followed(recipe: str) -> None:
    model = small(recipe, shape=(1, 4, 4), levels=256, classes=None)
    first = model.converted()
    largest = max(model.parameters(), key=lambda parameter: parameter.numel())
    version = largest._version
    largest.data.view(-1)[1] += 0.5
    assert largest._version == version
    assert model.converted() is not first
    assert model.converted() is model.converted()
    x, log_prob = model.sample_with_log_prob(2, seed=1)
    torch.testing.assert_close(log_prob, model.log_prob(x).detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", CONVERTED)
def test_a_network_in_16_bits_draws_as_its_parameters_do_in_float32(recipe: str, dtype: torch.dtype) -> None:
    model = small(recipe, shape=(1, 4, 4), levels=5, classes=3).to(dtype)
    wide = copy.deepcopy(model).float()
    x, log_prob = model.sample_with_log_prob(3, seed=2)
    expected, expected_log_prob = wide.sample_with_log_prob(3, seed=2)
    assert x.dtype == dtype
    assert torch.equal(x, expected.to(dtype))
    torch.testing.assert_close(log_prob.float(), expected_log_prob, atol=0.1, rtol=1e-2)
    torch.testing.assert_close(log_prob, model.log_prob(x, condition=torch.arange(3)).detach(), atol=0.5, rtol=0.05)
    known = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(model.complete(x, known, seed=3), wide.complete(x.float(), known, seed=3).to(dtype))
    tokens, state = model.tokens(x), model.start(3, condition=torch.arange(3))
    logits, state = model.step(tokens[:, :5], state)
    torch.testing.assert_close(logits.float(), wide.logits(x.float(), condition=torch.arange(3))[:, 1:6].detach())


@every_recipe
def test_a_checkpoint_is_the_model(recipe: str) -> None:
    model = small(recipe, shape=(3, 2, 2), levels=3, classes=None)
    copy = type(model)(type(model.config)(**model.config_dict())).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.sample(2), model.sample(2))
    assert model.network_passes() == model.length == 12


@every_recipe
def test_compiles_without_a_break(recipe: str) -> None:
    # One graph with its autograd, run by eager kernels: what the code generator makes of it is PyTorch's to test.
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    torch.compiler.reset()  # the recipes share what is compiled
    model = small(recipe, shape=(1, 2, 4), levels=5, classes=10)
    x, labels = random_pictures(model, 4), torch.arange(4)
    log_prob = compiled(model.log_prob)(x, condition=labels)
    torch.testing.assert_close(log_prob, model.log_prob(x, condition=labels))
    compiled(model.loss)(x, condition=labels).backward()
    gradient = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.loss(x, condition=labels).backward()
    torch.testing.assert_close(gradient, [p.grad for p in model.parameters()])


@every_recipe
def test_parameters_that_are_not_finite_are_said_to_be_so(recipe: str) -> None:
    model = small(recipe, shape=(1, 2, 2), levels=3, classes=10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("head.bias", "last.bias")):
                parameter.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="sample 6 met logits that are no distribution"):
        model.sample(2, ids=torch.tensor([6, 7]))


def test_bad_input_is_named() -> None:
    model: AutoregressiveModel = small("pixelcnn", shape=(1, 8, 8), levels=17, classes=10)
    with pytest.raises(ValueError, match=r"x has shape \(3,\), but expected \(n, 1, 8, 8\)"):
        model.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="condition is None"):
        model.loss(torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match="condition is None"):
        model.start(3)
    with pytest.raises(ValueError, match="steps is 7"):
        model.sample(2, steps=7)
    with pytest.raises(ValueError, match="steps is 7"):
        model.trajectory(2, steps=7)
    labels, known = torch.tensor([0, 1]), torch.ones(8, 8, dtype=torch.bool)
    for message, draw in {
        "n is 2.0, but expected an int of at least 0": lambda: model.sample(2.0),  # type: ignore[arg-type]
        "n is True, but expected an int of at least 0": lambda: model.sample(True),
        "n is -1, but expected at least 0": lambda: model.trajectory(-1),
        "ids has dtype torch.float32, but expected torch.int64": lambda: model.sample(1, ids=torch.tensor([1.7])),
        "ids is a list, but expected a tensor": lambda: model.sample(2, ids=[0, 1]),  # type: ignore[arg-type]
        "condition has dtype torch.float32, but": lambda: model.sample(2, condition=labels.float()),
        "condition is a int, but expected": lambda: model.sample(2, condition=1),  # type: ignore[arg-type]
        "condition is a list, but": lambda: model.log_prob(torch.zeros(1, 1, 8, 8), condition=[1]),  # type: ignore[arg-type]
        "known is a list, but": lambda: model.complete(torch.zeros(2, 1, 8, 8), [True]),  # type: ignore[arg-type, list-item]
        "x is a list, but expected a tensor": lambda: model.complete([0.0], known),  # type: ignore[arg-type, list-item]
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            draw()
    with pytest.raises(ValueError, match="x has no pictures, but expected at least one"):
        model.loss(torch.zeros(0, 1, 8, 8), condition=labels[:0])
    # Integers of another width are the same numbers, and so is NumPy's.
    narrow = model.sample(np.int64(2), ids=labels.int(), condition=labels.to(torch.uint8), seed=3)
    assert torch.equal(narrow, model.sample(2, condition=labels, seed=3))
    with pytest.raises(NotImplementedError):
        model.encode(torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("gated-pixelcnn", {"layers": 0}, "layers is 0"),
        ("gated-pixelcnn", {"shape": (5, 8, 8)}, "width is 12, but expected a positive multiple of the 5 channels"),
        ("gated-pixelcnn", {"kernel_size": 4}, "kernel_size is 4, but expected an odd number"),
        ("gated-pixelcnn", {"first_kernel_size": 1}, "first_kernel_size is 1"),
        ("gated-pixelcnn", {"dropout": 1.0}, "dropout is 1.0"),
        ("pixelcnn", {"width": 0}, "width is 0"),
        ("row-lstm", {"kernel_size": 2}, "kernel_size is 2"),
        ("pixelcnn++", {"shape": (2, 4, 4)}, "shape has 2 channels, but expected 1 or 3"),
        ("pixelcnn++", {"shape": (1, 3, 4)}, "expected a height and width divisible by 2"),
        ("pixelsnail", {"keys": 0}, "keys is 0"),
        ("wavenet", {"stacks": 0}, "stacks is 0"),
        ("made", {"degrees": "odd"}, "degrees is 'odd', but expected one of sequential, random"),
        ("transformer", {"heads": 5}, "width is 12, but expected a multiple of the 5 heads"),
        ("transformer", {"guidance": -1.0}, "guidance is -1.0"),
        ("transformer", {"guidance": 1.0, "classes": None}, "guidance is 1.0, but expected 0 without classes"),
        ("transformer", {"guidance": 1.0, "label_dropout": 0.0}, "guidance is 1.0 with label_dropout 0"),
        ("transformer", {"palette": 0}, "palette is 0"),
    ],
)
def test_bad_configuration_is_named(recipe: str, options: dict[str, Any], message: str) -> None:
    from pygen.workbench.families import build

    with pytest.raises(ValueError, match=message):
        build("autoregressive", recipe, **{**SMALL_RECIPES[recipe], **options})

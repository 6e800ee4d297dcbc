"""The training loop: schedule, average, clipping, players, batches, repeatability and what it refuses."""

from __future__ import annotations

import io
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen.model import ModelConfig
from pygen.workbench.averaging import decay
from pygen.workbench.checkpoint import CheckpointError, load_checkpoint, load_model, model_tensors
from pygen.workbench.data import permutation
from pygen.workbench.progress import Progress, Reporter, duration
from pygen.workbench.training import TrainingConfig, TrainingDiverged, train

sys.path.insert(0, str(Path(__file__).parent))

from toys import Duel, Toy, build, pictures


def run(model: Toy, **settings: Any) -> Any:
    options = {key: settings.pop(key) for key in ("out", "resume", "progress", "tensorboard") if key in settings}
    config = TrainingConfig(**{"steps": 6, "batch_size": 5, "log_every": 1, **settings})
    return train(model, pictures(), config, **{"progress": False, **options})


def test_rate_by_hand() -> None:
    config = TrainingConfig(steps=10, warmup=4)
    rates = [config.rate(step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[7] == pytest.approx(0.5)
    assert rates[9] == pytest.approx((1 + math.cos(math.pi * 5 / 6)) / 2)
    constant = TrainingConfig(steps=10, warmup=4, schedule="constant")
    assert [constant.rate(step) for step in range(10)] == pytest.approx([0.25, 0.5, 0.75] + [1] * 7)


@given(st.integers(1, 300), st.integers(0, 400), st.sampled_from(["cosine", "constant"]))
def test_rate_is_positive_and_falls_after_the_warm_up(steps: int, warmup: int, schedule: Any) -> None:
    config = TrainingConfig(steps=steps, warmup=warmup, schedule=schedule)
    rates = [config.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[:warmup] == sorted(rates[:warmup])


def test_decay_by_hand() -> None:
    assert decay(1000, 50, 100, None) == pytest.approx(0.5**0.5)
    assert decay(1, 50, 100, 0.1) == pytest.approx(0.5**10)
    assert decay(10**6, 50, 100, 0.1) == pytest.approx(0.5**0.5)
    assert decay(5, 50, 0, None) == 0


def test_average_is_the_sum_it_says() -> None:
    """Against the weights after each step, averaged in float64 by the formula."""
    weights = []
    for steps in range(5):
        model = build(Toy)
        if steps:
            run(model, steps=steps, schedule="constant")
        weights.append(model.first.weight.detach().double())
    expected = weights[0]
    for step, after in enumerate(weights[1:], 1):
        beta = 0.5 ** (5 / min(8, step * 5 * 0.4))
        expected = beta * expected + (1 - beta) * after
    result = run(build(Toy), steps=4, schedule="constant", ema_images=8, ema_ramp=0.4)
    torch.testing.assert_close(result.ema.first.weight.double(), expected, rtol=0, atol=1e-7)
    assert not torch.allclose(result.ema.first.weight, result.model.first.weight, atol=1e-4)
    assert torch.equal(result.ema.norm.running_mean, result.model.norm.running_mean)
    assert not result.ema.training
    assert not result.ema.first.weight.requires_grad
    assert result.model.first.weight.requires_grad


def test_without_a_half_life_the_average_is_the_weights() -> None:
    result = run(build(Toy), ema_images=0)
    average = model_tensors(result.ema)
    assert all(torch.equal(value, average[name]) for name, value in model_tensors(result.model).items())


def test_clipping_against_a_step_by_hand() -> None:
    """Adam with epsilon in the way: scaled gradients show in the moments, which Adam would else divide out."""
    free = run(build(Toy), steps=1, clip=None)
    norm = free.history[0]["gradient_norms"]["model"]
    for clip in (norm / 4, norm * 4):
        grads = _moments(clip)
        expected = _moments(None)
        factor = min(1.0, clip / norm)
        for name, value in expected.items():
            torch.testing.assert_close(grads[name], value * factor, rtol=1e-4, atol=1e-12)


def _moments(clip: float | None) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        run(build(Toy), steps=1, clip=clip, out=folder)
        state = load_checkpoint(folder).optimizers
    return {name: value for name, value in state.items() if name.endswith("exp_avg")}


def test_players_take_turns_on_the_same_batch() -> None:
    model = build(Duel)
    result = run(model, steps=3, player_rates={"critic": 2.0})
    assert [player for player, *_ in model.asked] == ["critic", "forger"] * 3
    for player, x, needs in model.asked:
        assert needs == {"critic": player == "critic", "forger": player == "forger"}
        assert x.shape == (5, 1, 2, 3)
    for critic, forger in zip(model.asked[::2], model.asked[1::2], strict=True):
        assert torch.equal(critic[1], forger[1])
    assert not torch.equal(model.asked[0][1], model.asked[2][1])
    assert list(result.history[0]["losses"]) == ["critic", "forger"]
    assert torch.equal(model.frozen, torch.ones(3))
    assert not model.frozen.requires_grad
    assert model.critic.weight.requires_grad
    assert model.last.weight.requires_grad


def test_a_player_with_rate_zero_stands_still_and_the_other_moves() -> None:
    before, after = build(Duel), build(Duel)
    run(after, player_rates={"critic": 0.0})
    assert torch.equal(before.critic.weight, after.critic.weight)
    assert not torch.equal(before.first.weight, after.first.weight)


def test_first_step_moves_by_the_learning_rate() -> None:
    """Adam's first step is the learning rate in the direction of the sign, times the player's factor."""
    before, after = build(Duel), build(Duel)
    run(after, steps=1, clip=None, learning_rate=1e-3, player_rates={"critic": 3.0})
    step = (after.critic.weight - before.critic.weight).abs()
    torch.testing.assert_close(step, torch.full_like(step, 3e-3), rtol=1e-3, atol=0)


def test_weight_decay_spares_biases() -> None:
    """At gradients of zero AdamW only decays."""

    class Still(Toy):
        def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
            return sum(parameter.sum() for parameter in self.parameters()) * 0.0  # type: ignore[return-value]

    before, after = build(Still), build(Still)
    run(after, steps=1, weight_decay=0.5, learning_rate=0.1, schedule="constant")
    torch.testing.assert_close(after.first.weight, before.first.weight * 0.95)
    assert torch.equal(after.first.bias, before.first.bias)
    assert torch.equal(after.norm.weight, before.norm.weight)


def test_every_picture_once_an_epoch_and_batches_span_epochs() -> None:
    seen: list[Tensor] = []

    class Watching(Toy):
        def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
            assert condition is not None
            seen.append(torch.cat([x.flatten(1), condition[:, None]], 1))
            return super().loss(x)

    data = pictures()
    train(build(Watching), data, TrainingConfig(steps=8, batch_size=29, seed=4), progress=False)
    rows = torch.cat([permutation(23, 4, epoch) for epoch in range(11)])[: 8 * 29]
    assert data.labels is not None
    expected = torch.cat([data.values(rows).flatten(1), data.labels[rows][:, None]], 1)
    assert torch.equal(torch.cat(seen), expected)


def test_unlabelled_training_of_labelled_pictures() -> None:
    asked: list[Tensor | None] = []

    class Watching(Toy):
        def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
            asked.append(condition)
            return super().loss(x)

    model = Watching(ModelConfig(shape=(1, 2, 3), levels=5, classes=None))
    run(model, steps=2)
    assert asked == [None, None]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    first = run(build(Duel))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == flags
    torch.rand(5)
    again, other = run(build(Duel)), run(build(Duel), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(first.model.first.weight, other.model.first.weight)


def test_training_learns() -> None:
    result = run(build(Toy), steps=300, batch_size=23, learning_rate=1e-2, log_every=50)
    losses = [record["losses"]["model"] for record in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert [record["step"] for record in result.history] == [50, 100, 150, 200, 250, 300]
    assert result.step == 300
    assert result.seconds > 0
    assert result.checkpoint is None


def test_history_is_the_mean_since_the_last_record() -> None:
    each, pairs = run(build(Toy), steps=6).history, run(build(Toy), steps=6, log_every=2).history
    for number, record in enumerate(pairs):
        both = [each[2 * number + i]["losses"]["model"] for i in range(2)]
        assert record["losses"]["model"] == pytest.approx(sum(both) / 2)


def test_autocast_reaches_the_loss() -> None:
    kinds = []

    class Watching(Toy):
        def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
            kinds.append(self.first(x.flatten(1)).dtype)
            return super().loss(x)

    result = run(build(Watching), steps=1, autocast="bf16")
    run(build(Watching), steps=1)
    assert kinds == [torch.bfloat16, torch.float32]
    assert result.model.first.weight.dtype == torch.float32


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path: Path, where: str) -> None:
    class Breaking(Toy):
        asked = 0

        def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
            self.asked += 1
            if self.asked != 5:
                return super().loss(x)
            zero = self.first.weight.sum() * 0
            return zero.sqrt() if where == "gradient norm" else super().loss(x) * math.nan

    with pytest.raises(TrainingDiverged) as caught:
        run(build(Breaking), steps=9, checkpoint_every=3, log_every=100, out=tmp_path)
    text = str(caught.value)
    assert f"the {where} of player 'model' became" in text
    assert "in step 5 of 9" in text
    assert text.endswith("step-00000003 is the last good checkpoint")
    assert all(value.isfinite().all() for value in model_tensors(load_model(tmp_path, model=build(Toy))).values())
    assert load_checkpoint(tmp_path).step == 3


def test_an_earlier_run_is_not_overwritten_and_a_finished_one_returns_at_once(tmp_path: Path) -> None:
    first = run(build(Toy), out=tmp_path)
    with pytest.raises(CheckpointError, match=r"earlier run \(step-00000006\): resume it, or choose"):
        run(build(Toy), out=tmp_path)
    again = run(build(Toy), out=tmp_path, resume=True)
    assert torch.equal(again.model.first.weight, first.model.first.weight)
    assert (again.step, len(again.history)) == (6, 6)
    assert 0 < again.seconds <= first.seconds
    assert again.checkpoint == tmp_path / "step-00000006"


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = build(Duel)
    with pytest.raises(CheckpointError, match=r"file/run cannot be written \(Not a directory\), but expected a folder"):
        run(model, out=tmp_path / "file" / "run")
    assert model.asked == []


def test_resuming_with_more_steps_goes_on(tmp_path: Path) -> None:
    run(build(Toy), out=tmp_path, schedule="constant", steps=3)
    longer = run(build(Toy), out=tmp_path, schedule="constant", resume=True)
    whole = run(build(Toy), schedule="constant")
    assert torch.equal(longer.model.first.weight, whole.model.first.weight)
    with pytest.raises(CheckpointError, match="has done 6 steps, but steps is 5"):
        run(build(Toy), out=tmp_path, schedule="constant", steps=5, resume=True)


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    run(build(Toy), out=tmp_path)
    with pytest.raises(CheckpointError, match="the training's batch_size = 5, but is now to go on with 4"):
        run(build(Toy), out=tmp_path, batch_size=4, resume=True)
    config = TrainingConfig(steps=6, batch_size=5, log_every=1)
    with pytest.raises(CheckpointError, match="trained on other pictures"):
        train(build(Toy), pictures(22), config, out=tmp_path, resume=True, progress=False)
    other = Toy(ModelConfig(shape=(1, 2, 3), levels=5, classes=None))
    with pytest.raises(CheckpointError, match="the model's classes = 3, but is now to go on with None"):
        run(other, out=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"clip": 0.0}, "clip is 0.0, but expected a positive number or None"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"schedule": "linear"}, "schedule is 'linear', but expected one of cosine, constant"),
        ({"autocast": "fp16"}, "autocast is 'fp16'"),
        ({"player_rates": {"model": -1.0}}, r"player_rates\['model'\] is -1.0"),
        ({"player_rates": {"critic": 1.0}}, "player_rates names 'critic', but the players are model"),
        ({"resume": True}, "out is None, but resume"),
        ({"tensorboard": True}, "out is None, but tensorboard"),
    ],
)
def test_bad_settings(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(build(Toy), **setting)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"shape": (1, 3, 2)}, r"shape \(1, 2, 3\), but Toy expects \(1, 3, 2\)"),
        ({"levels": 6}, "toys has 5 levels, but Toy expects 6"),
        ({"classes": 4}, "toys has 3 classes, but Toy expects 4"),
    ],
)
def test_data_that_do_not_fit_the_model(config: dict[str, Any], says: str) -> None:
    model = Toy(ModelConfig(**{"shape": (1, 2, 3), "levels": 5, "classes": 3, **config}))
    with pytest.raises(ValueError, match=says):
        run(model)


def test_a_player_without_parameters_is_refused() -> None:
    model = build(Toy)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="player 'model' of Toy has no parameters to train"):
        run(model)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for stream, expected in ((Terminal(), "\r"), (io.StringIO(), "")):
        with Reporter(True, "gan", 200, 64, stream=stream) as reporter:
            reporter.start(100)
            reporter.report(150, {"critic": 0.25})
        text = stream.getvalue()
        assert text.startswith(f"{expected}gan  150/200  75%  ")
        assert "steps/s" in text
        assert "pictures/s" in text
        assert " left  critic 0.25" in text
        assert text.endswith("\n")


def test_a_line_updated_in_place_does_not_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    Reporter(True, "gan", 200, 64, stream=stream).report(150, {"critic" * 9: 0.25})
    assert len(stream.getvalue()) == len("\r") + 39 + len("\x1b[K")


def test_progress_rates() -> None:
    shown = Progress("", 5, 1000, 2.0, 128.0, 497.5, {"model": 1.5})
    assert str(shown) == "   5/1000   0%  2 steps/s  128 pictures/s  8m18s left  loss 1.5"
    assert [duration(s) for s in (0, 59.4, 187, 18120, 187200)] == ["0s", "59s", "3m07s", "5h02m", "2d04h"]


def test_progress_reaches_a_function_and_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[Progress] = []
    run(build(Duel), progress=shown.append)
    assert (shown[-1].step, shown[-1].steps, shown[-1].label, list(shown[-1].losses)) == (
        6,
        6,
        "Duel",
        ["critic", "forger"],
    )
    assert shown[-1].pictures_per_second == pytest.approx(5 * shown[-1].steps_per_second)
    run(build(Toy), progress=True)
    assert "Toy  6/6 100%" in capsys.readouterr().err
    run(build(Toy))
    assert capsys.readouterr().err == ""


def test_tensorboard_is_written_or_its_absence_said(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"tensorboard is not installed.*: pip install tensorboard$"):
            run(build(Toy), out=tmp_path, tensorboard=True)
    else:
        run(build(Toy), out=tmp_path, tensorboard=True)
        assert list((tmp_path / "tensorboard").iterdir())

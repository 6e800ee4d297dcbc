"""The examples run from end to end, with a few steps of training in the place of many, and do what they say."""

from __future__ import annotations

import math
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def load(name: str) -> Any:
    """What an example defines, without its main program having run."""
    return types.SimpleNamespace(**runpy.run_path(str(FOLDER / f"{name}.py")))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--steps", "3"])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    assert not re.search(r"\b(nan|inf)\b", printed)
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_there_is_one_for_each_use():
    uses = {"tabular", "super_resolution", "transfer", "vae_flows", "completion", "wavenet"}
    assert {path.stem for path in EXAMPLES} >= uses


def test_the_density_of_healthy_rows_finds_the_others():
    example = load("tabular")
    training, rows, malignant = example.cells()
    flow = example.neural_spline_flow(training.shape[1], layers=4, hidden=64)

    benign = rows[malignant == 0]
    # Each measurement as it was, from another row: an anomaly of what goes with what.
    mixed = torch.stack([column[torch.randperm(len(benign))] for column in benign.T], 1)

    def area(anomalies: Tensor) -> float:
        flow.eval()
        with torch.no_grad():
            score = -flow.log_prob(torch.cat((benign, anomalies)))
        flow.train()
        return roc_auc_score([0] * len(benign) + [1] * len(anomalies), score.numpy())

    assert area(mixed) < 0.8
    losses = example.train(flow, training, steps=100)
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert area(mixed) > 0.95
    assert area(rows[malignant == 1]) > 0.85


def test_super_resolution_reads_the_low_resolution():
    example = load("super_resolution")
    training, test = example.photographs()
    flow = example.build(width=16, couplings=2)
    losses = example.train(flow, training, steps=40, batch=8)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    flow.eval()
    x = example.crops(test, 8, example.SIZE, torch.Generator().manual_seed(1))
    low = F.avg_pool2d(x, 2)
    ids = torch.arange(8)
    with torch.no_grad():
        own, others = flow.log_prob(x, low), flow.log_prob(x, low.flip(0))
        draws = example.enlarge(flow, low, temperature=0.8, ids=ids)
        again = example.enlarge(flow, low, temperature=0.8, ids=ids + 8)
        likely = [example.enlarge(flow, low, temperature=0.0, ids=ids + k) for k in (0, 8)]
    assert (own != others).all() and own.mean() > others.mean()
    assert not torch.equal(draws, again) and torch.equal(*likely)

    def distance(of: Tensor) -> Tensor:
        return (F.avg_pool2d(draws, 2) - of).abs().mean()

    assert distance(low) < 0.7 * distance(low.flip(0))


def test_transfer_goes_to_the_other_set_and_back():
    example = load("transfer")
    x, of, unseen, source = example.pictures()
    config = example.GlowConfig(
        shape=(1, 8, 8), levels=example.LEVELS, classes=example.SETS, labels="steps", scales=2, steps=4, width=16,
        margin=0.05,
    )  # fmt: skip
    model = example.Glow(config)
    example.train(model, x, of, steps=90, batch=32)
    model.eval()
    target = (source + 1) % example.SETS
    with torch.no_grad():
        moved = example.transfer(model, unseen, source, target)
        back = example.transfer(model, moved, target, source)
        likely = [model.log_prob(pictures, condition=target) for pictures in (moved, unseen)]
    # Not all: a picture is a corner of the cell of grey values that its latent came from.
    assert (back == unseen).float().mean() > 0.7
    assert (moved == unseen).float().mean() < 0.6
    assert (likely[0] > likely[1]).float().mean() > 0.6
    kept = example.correlation(unseen, source, moved, target)
    assert (kept > 0.5).all()


def test_a_vae_learns_with_flows_in_both_places():
    example = load("vae_flows")
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    model = example.build(posterior=True, prior=True)
    assert example.build(posterior=False, prior=False).prior is None

    def bits(samples: int) -> float:
        model.eval()
        with torch.no_grad():
            bound = model.log_prob(x[1500:], condition=labels[1500:], importance_samples=samples).mean()
        model.train()
        return float(-bound) / (64 * math.log(2))

    before = bits(1)
    flows = [[p.clone() for p in flow.parameters()] for flow in (model.posterior_flow, model.prior)]
    example.train(model, x[:1400], labels[:1400], steps=60)
    after = bits(1)
    assert math.isfinite(after) and after < before - 0.8
    # More samples tighten the bound.
    assert bits(16) < after
    for flow, parameters in zip((model.posterior_flow, model.prior), flows, strict=True):
        assert all(not torch.equal(p, q) for p, q in zip(flow.parameters(), parameters, strict=True))


def test_wavenet_learns_a_sound_and_goes_on_from_it(tmp_path, monkeypatch):
    example = load("wavenet")
    sound = example.compress(example.melody(2.0, 8000))
    assert (sound.min(), sound.max()) == (pytest.approx(-0.96, abs=0.06), pytest.approx(0.96, abs=0.06))
    model = example.WaveNet(example.WaveNetConfig(shape=(1, 1, 400), layers=5, stacks=1, width=16, skip=32))
    losses = example.train(model, sound, steps=60, batch=4)
    assert losses[-1] < losses[0] - 0.5
    monkeypatch.chdir(tmp_path)
    example.write_wav("given.wav", example.expand(sound), 8000)
    options = ["--sound", "given.wav", "--steps", "2", "--seconds", "0.05", "--out", "out.wav"]
    monkeypatch.setattr(sys, "argv", ["wavenet.py", *options])
    example.main()
    (given,), _ = example.read_wav("given.wav")
    (written,), rate = example.read_wav("out.wav")
    assert (len(written), rate) == (4400, 8000)
    torch.testing.assert_close(written[:4000], given[:4000], atol=2e-3, rtol=0.02)
    assert written[4000:].std() > 0


@pytest.mark.parametrize("name", ["steps 0", "steps -2", "seconds -1.0", "seconds nan", "temperature -1.0"])
def test_wavenet_says_what_it_cannot_do(name, tmp_path, monkeypatch):
    option, value = name.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wavenet.py", "--steps", "1", f"--{option}", value])
    with pytest.raises(ValueError, match=f"{option} is {value}, but expected a"):
        load("wavenet").main()

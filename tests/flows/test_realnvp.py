"""RealNVP: what its couplings move, known densities, round trips over shapes, the way from Z to X."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import ops
from pygen.flows import RealNVP, RealNVPConfig


def build(scatter: float = 0.1, **options: Any) -> RealNVP:
    """A small model in eval mode whose couplings are not the identity that they start as."""
    torch.manual_seed(0)
    settings = {"width": 8, "couplings": 8, **options}
    model = RealNVP(RealNVPConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name or "second" in name or "label" in name:
                parameter.normal_(0, scatter)
    return model


def pictures(model: RealNVP, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(model.config.levels, (n, *model.config.shape), generator=generator)
    return model.dequantize(k).to(next(model.parameters()).dtype)


@pytest.mark.parametrize(("shape", "scales"), [((1, 4, 4), 2), ((3, 2, 4), 1), ((2, 4, 4), 2)])
def test_every_value_depends_on_another(shape: tuple[int, int, int], scales: int) -> None:
    model = build(shape=shape, scales=scales, classes=None).double()
    v = torch.rand(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: model.flow.encode(v).flatten(), v)
    # No part of the picture is left out of the couplings.
    assert (jacobian.reshape(v.numel(), -1) != 0).sum(1).min() > 1


def test_a_flow_of_identities_has_a_known_density() -> None:
    # With zero-initialized heads the flow is an affine map to [-1, 1]: P(cell) ~ N(2 v - 1; 0, 1) 2 / levels.
    model = RealNVP(RealNVPConfig(shape=(1, 2, 2), levels=3, scales=1, margin=None, classes=None)).double().eval()
    x = torch.tensor([[[[-1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    u = ops.uniform(torch.tensor([0]), (1, 2, 2), seed=0).double()
    v = (torch.tensor([[0, 1], [2, 1]]) + u) / 3
    expected = (torch.distributions.Normal(0.0, 1.0).log_prob(2 * v - 1) + math.log(2 / 3)).sum()
    torch.testing.assert_close(model.log_prob(x)[0], expected)


@given(
    channels=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3), scales=st.integers(1, 2),
    levels=st.sampled_from([2, 17, 256]), n=st.integers(0, 3),
)  # fmt: skip
def test_shapes_and_round_trip(channels: int, rows: int, columns: int, scales: int, levels: int, n: int) -> None:
    shape = (channels, rows * 2**scales, columns * 2**scales)
    model = build(0.05, shape=shape, scales=scales, levels=levels, couplings=2)
    x = pictures(model, n)
    labels = torch.arange(n)
    with torch.no_grad():
        z = model.encode(x, condition=labels)
        assert z.shape == x.shape
        assert torch.equal(model.decode(z, condition=labels), x)
        assert model.log_prob(x, condition=labels).shape == (n,)
        v = torch.rand_like(x)
        back = model.flow.decode(model.flow.encode(v, labels), labels)
    torch.testing.assert_close(back, v, atol=1e-4, rtol=0)
    drawn = model.sample(n)
    assert drawn.shape == x.shape
    assert torch.equal(model.dequantize(model.quantize(drawn)), drawn)


def test_the_model_on_colour_pictures() -> None:
    model = build(0.02, shape=(3, 32, 32), levels=256, scales=3, classes=None)
    x = pictures(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(x)), x)
        assert model.log_prob(x).isfinite().all()


def test_trajectory_goes_from_the_noise_to_the_sample() -> None:
    model = build()
    stages = model.trajectory(2, ids=torch.tensor([3, 8]), seed=1)
    couplings = [k for k, stage in enumerate(stages) if stage.label.endswith("coupling")]
    assert len(couplings) == 2 * model.config.couplings
    # Back from the prior, a coupling moves half of what is in play: half of the picture at first, then all of it.
    moved = [(stages[k].values != stages[k - 1].values).float().mean().item() for k in couplings]
    assert moved == [0.25] * model.config.couplings + [0.5] * model.config.couplings
    # The last stage before the picture is one logit away from it, so the stages are laid out as pictures.
    v = (stages[-2].values.sigmoid() - 0.05) / 0.9
    assert torch.equal(model.dequantize((v * 17).floor().clamp(0, 16)), stages[-1].values)


def test_loss_decreases() -> None:
    torch.manual_seed(0)
    model = RealNVP(RealNVPConfig(width=16, couplings=2))
    x = torch.full((32, 1, 8, 8), -1.0)
    x[:, :, 2:6, 2:6] = 1.0
    labels = torch.arange(32) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.loss(x, condition=labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 8, 6)}, r"shape is \(1, 8, 6\) with scales 2, but expected .* divisible by 4"),
        ({"scales": 0}, "scales is 0"),
        ({"couplings": 0}, "couplings is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"limit": 0.0}, "limit is 0.0"),
        ({"margin": 0.5}, "margin is 0.5"),
    ],
)
def test_bad_configuration_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RealNVPConfig(**options)


def test_the_conditioners_start_as_identities() -> None:
    model = RealNVP(RealNVPConfig())
    v = torch.rand(2, 1, 8, 8)
    z = model.flow.encode(v, torch.tensor([1, 2]))
    p = 0.05 + 0.9 * v
    torch.testing.assert_close(z, torch.log(p / (1 - p)))

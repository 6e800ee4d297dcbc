"""RealNVP behind the contract: exact change of variables, round trips, addressed noise, compilation, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import ops
from pygen.flows import RealNVP, RealNVPConfig
from pygen.flows.realnvp import squeeze, unsqueeze
from pygen.model import Density


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


@pytest.mark.parametrize("margin", [0.05, None])
@pytest.mark.parametrize(("shape", "scales"), [((1, 4, 4), 2), ((3, 2, 4), 1), ((2, 4, 4), 2)])
def test_log_determinant_is_that_of_the_jacobian(
    shape: tuple[int, int, int], scales: int, margin: float | None
) -> None:
    model = build(shape=shape, scales=scales, margin=margin, classes=3).double()
    v = torch.rand(1, *shape, dtype=torch.float64)
    label = torch.tensor([2])
    z, ladj = model.to_prior(v, condition=label)
    jacobian = torch.autograd.functional.jacobian(lambda v: model.to_prior(v, condition=label)[0].flatten(), v)
    slogdet = torch.linalg.slogdet(jacobian.reshape(z.numel(), z.numel())).logabsdet
    torch.testing.assert_close(ladj[0], slogdet)
    back, minus = model.from_prior(z, condition=label)
    torch.testing.assert_close(back, v)
    torch.testing.assert_close(minus, -ladj)
    # Every value of the prior point moves: no part of the picture is left out of the couplings.
    assert (jacobian.reshape(z.numel(), -1) != 0).sum(1).min() > 1


def test_log_prob_is_the_density_in_the_cell_times_its_volume() -> None:
    model = build(shape=(1, 4, 4), levels=5).double()
    x = pictures(model, 3)
    ids, labels = torch.tensor([4, 9, 2]), torch.tensor([0, 1, 9])
    u = ops.uniform(ids, (1, 4, 4), seed=7).double()
    v = (torch.round((x + 1) * 2) + u) / 5
    z, ladj = model.to_prior(v, condition=labels)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
    expected = normal + ladj - 16 * math.log(5)
    torch.testing.assert_close(model.log_prob(x, condition=labels, ids=ids, seed=7), expected)
    assert model.density is Density.EXACT


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
        back = model.from_prior(model.to_prior(v, condition=labels)[0], condition=labels)[0]
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


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_squeeze_puts_the_checkerboard_in_the_first_half(rows: int, columns: int, channels: int) -> None:
    x = torch.arange(channels * rows * columns * 4.0).reshape(1, channels, 2 * rows, 2 * columns)
    assert torch.equal(unsqueeze(squeeze(x)), x)
    board = ((torch.arange(2 * rows)[:, None] + torch.arange(2 * columns)) % 2).float()
    first, second = squeeze(board.expand_as(x)).chunk(2, dim=1)
    assert (first == 0).all()
    assert (second == 1).all()


def test_a_sample_is_its_id_whatever_the_batch() -> None:
    model = build()
    whole = model.sample(12, seed=5)
    ids = torch.tensor([7, 0, 11])
    assert torch.equal(model.sample(3, ids=ids, seed=5), whole[ids])
    assert torch.equal(model.sample(3, ids=ids, condition=ids % 10, seed=5), whole[ids])
    assert not torch.equal(model.sample(12, seed=6), whole)
    assert not torch.equal(model.sample(3, ids=ids, condition=(ids + 1) % 10, seed=5), whole[ids])


def test_trajectory_goes_from_the_noise_to_the_sample() -> None:
    model = build()
    ids = torch.tensor([3, 8])
    stages = model.trajectory(2, ids=ids, seed=1)
    assert torch.equal(stages[0].values, ops.noise(ids, (1, 8, 8), seed=1))
    assert torch.equal(stages[-1].values, model.sample(2, ids=ids, seed=1))
    assert (stages[0].label, stages[-1].label) == ("Z", "X")
    assert len(stages) == 2 + 2 * model.config.couplings
    assert all(stage.values.shape == (2, 1, 8, 8) for stage in stages)
    # The last coupling's state is one logit away from the picture, so the stages are laid out as pictures.
    v = (stages[-2].values.sigmoid() - 0.05) / 0.9
    assert torch.equal(model.dequantize((v * 17).floor().clamp(0, 16)), stages[-1].values)
    moved = {(a.values != b.values).float().mean().item() for a, b in itertools.pairwise(stages[:-1])}
    assert moved == {0.5, 0.25}  # a coupling moves half of what is in play: all values, then a scale less


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


def test_loss_is_the_mean_negative_log_likelihood_per_dimension() -> None:
    model = build(0.05).double()
    # Black pictures, whose density changes across the cell: the noise must fill it.
    x, labels = torch.full((8, 1, 8, 8), -1.0, dtype=torch.float64), torch.arange(8)
    torch.manual_seed(3)
    losses = torch.stack([model.loss(x, condition=labels).detach() for _ in range(40)])
    nats = torch.stack([-model.log_prob(x, condition=labels, seed=s).detach().mean() / 64 for s in range(40)])
    assert abs(losses.mean() - nats.mean()) < 5 * (losses.var() / 40 + nats.var() / 40).sqrt()


def test_players_and_passes() -> None:
    model = build()
    assert model.network_passes() == 1
    assert sum(p.numel() for p in model.players()["model"]) == sum(p.numel() for p in model.parameters())
    copy = RealNVP(RealNVPConfig(**model.config_dict())).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.sample(2), model.sample(2))


def test_compiles_without_a_break() -> None:
    # One graph with its autograd, run by eager kernels: what the code generator makes of it is PyTorch's to test.
    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    model = build(0.1, couplings=2, width=4, scales=1, shape=(1, 4, 4))
    x, labels = pictures(model, 4), torch.arange(4)
    log_prob = compiled(model.log_prob)(x, condition=labels)
    torch.testing.assert_close(log_prob, model.log_prob(x, condition=labels))
    torch.manual_seed(1)
    compiled(model.loss)(x, condition=labels).backward()
    gradient = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    model.loss(x, condition=labels).backward()
    torch.testing.assert_close(gradient, [p.grad for p in model.parameters()])
    z = torch.randn(4, 1, 4, 4)
    torch.testing.assert_close(compiled(model.decode)(z, condition=labels), model.decode(z, condition=labels))


def test_bad_input_is_named() -> None:
    model = build(couplings=1, width=2)
    with pytest.raises(ValueError, match=r"x has shape \(3,\), but expected \(n, 1, 8, 8\)"):
        model.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="condition is None"):
        model.log_prob(torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match=r"z has shape \(3, 1, 8, 4\), but expected \(n, 1, 8, 8\)"):
        model.decode(torch.zeros(3, 1, 8, 4), condition=torch.zeros(3))
    with pytest.raises(ValueError, match="steps is 7"):
        model.sample(2, steps=7)
    with pytest.raises(ValueError, match="steps is 7"):
        model.trajectory(2, steps=7)


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
    z, _ = model.to_prior(v, condition=torch.tensor([1, 2]))
    p = 0.05 + 0.9 * v
    torch.testing.assert_close(z, torch.log(p / (1 - p)))

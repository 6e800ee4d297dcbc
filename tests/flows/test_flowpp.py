"""Flow++: dequantization by a flow gives a density in the cell, and so a bound; its layers and its network."""

from __future__ import annotations

import pytest
import torch
from flow_cases import SMALL_RECIPES
from torch import nn

from pygen import ops
from pygen.flows import FlowPP, FlowPPConfig
from pygen.nn.gated import GatedConditioner

TINY = (1, 4, 4)


def small(scatter: float = 0.1, **options: object) -> FlowPP:
    torch.manual_seed(0)
    model = FlowPP(FlowPPConfig(**{"shape": TINY, "levels": 5, "classes": 3, **SMALL_RECIPES["flowpp"], **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scatter * torch.randn_like(parameter))
    return model.double().eval()


def test_the_noise_has_the_density_that_is_claimed():
    dequantizer = small().dequantizer
    x = torch.rand(1, *TINY, dtype=torch.float64) * 2 - 1
    u, log_q = dequantizer.sample_and_log_prob(1, context=x, seed=4)
    assert ((u > 0) & (u < 1)).all()
    torch.testing.assert_close(dequantizer.log_prob(u, x), log_q)
    jacobian = torch.autograd.functional.jacobian(lambda u: dequantizer.encode(u, x).flatten(), u).reshape(16, 16)
    normal = dequantizer.base.log_prob(dequantizer.encode(u, x))
    torch.testing.assert_close(log_q, normal + torch.linalg.slogdet(jacobian).logabsdet)


def test_the_noise_depends_on_the_picture():
    dequantizer = small(0.3).dequantizer
    black, white = (torch.full((1, *TINY), value, dtype=torch.float64) for value in (-1.0, 1.0))
    assert not torch.allclose(dequantizer.sample(1, context=black), dequantizer.sample(1, context=white))


def test_the_density_of_the_noise_integrates_to_one_over_the_cell():
    # So that E_q[log p - log q] is at most the logarithm of the integral of p, by Jensen's inequality.
    dequantizer, n = small(0.02).dequantizer, 20_000
    x = (torch.rand(1, *TINY, dtype=torch.float64) * 2 - 1).expand(n, -1, -1, -1)
    u = ops.uniform(torch.arange(n), TINY, seed=1, dtype=torch.float64).clamp_min(1e-9)
    with torch.no_grad():
        q = dequantizer.log_prob(u, x).exp()
    assert abs(float(q.mean()) - 1) < 5 * float(q.std()) / n**0.5 < 0.5


def test_training_tightens_the_bound_by_the_noise_alone():
    model = small(0.05).float()
    x = model.dequantize(torch.randint(5, (32, *TINY)))
    labels = torch.arange(32) % 3
    before = model.log_prob(x, condition=labels).mean()
    optimizer = torch.optim.Adam(model.dequantizer.parameters(), lr=2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(x, condition=labels).backward()
        optimizer.step()
    assert model.log_prob(x, condition=labels).mean() > before + 0.3


@pytest.mark.parametrize("context_channels", [0, 3])
def test_the_network_reads_labels_or_features(context_channels):
    classes = None if context_channels else 4
    net = GatedConditioner(
        2, 5, (2, 3), width=4, blocks=1, heads=2, classes=classes, context_channels=context_channels
    ).eval()
    x = torch.randn(3, 2, 2, 3)
    contexts = (torch.tensor([0, 1, 2]), torch.tensor([3, 1, 2]))
    if context_channels:
        contexts = tuple(torch.randn(3, 3, 2, 3) for _ in range(2))
    one, other = (net(x, context) for context in contexts)
    assert one.shape == (3, 5, 2, 3)
    assert one.abs().max() < 1
    assert not torch.equal(one[0], other[0])


def test_equal_components_do_not_stay_equal():
    # Components that start alike, as under a last layer of zeros, have equal gradients for ever.
    model = small(0.0)
    heads = [module.head for module in model.modules() if isinstance(module, GatedConditioner)]
    assert all(isinstance(head, nn.Conv2d) and head.weight.unique(dim=0).shape[0] > 1 for head in heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 6, 8)}, r"shape is \(1, 6, 8\), but expected a height and width divisible by 4"),
        ({"width": 5}, "width is 5, but expected a multiple of the 2 heads"),
        ({"components": 0}, "components is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dequantizer_couplings": 0}, "dequantizer_couplings is 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)

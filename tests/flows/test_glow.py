"""Glow: what leaves a scale is normal given what stays, the class moves the prior, depth does not cost memory."""

from __future__ import annotations

import pytest
import torch

from pygen.flows import Flow, Glow, GlowConfig, StandardNormal
from pygen.flows.glow import ClassPrior, ZeroConv2d, _scale


def build(**options: object) -> Glow:
    torch.manual_seed(0)
    return Glow(GlowConfig(**{"shape": (1, 8, 8), "scales": 2, "steps": 2, "width": 8, "classes": 3, **options}))


def test_the_class_moves_the_prior_of_the_last_scale_alone():
    model = build().double().eval()
    prior = next(module for module in model.modules() if isinstance(module, ClassPrior))
    with torch.no_grad():
        prior.table.weight.normal_()
    v = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    one, other = (model.flow.encode(v, torch.full((2,), label)) for label in (0, 2))
    changed = (one != other)[0].flatten()
    # Two scales of one channel: half of the 64 values leave after the first.
    assert int(changed.sum()) == 32


def test_what_leaves_is_normal_given_what_stays():
    config = GlowConfig(shape=(1, 4, 4), scales=2, steps=1, width=4, classes=None)
    *_, leaving = _scale(config, 4, False)
    conv = leaving.transform.conditioner
    assert isinstance(conv, ZeroConv2d)
    with torch.no_grad():
        conv.weight.normal_(0, 0.3)
        conv.gain.normal_(0, 0.3)
    flow = Flow([leaving], StandardNormal((4, 2, 2)))
    x = torch.randn(5, 4, 2, 2)
    stays, leaves = x.chunk(2, dim=1)
    log_std, mean = conv(stays).chunk(2, dim=1)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(leaves).flatten(1).sum(1)
    expected = expected + torch.distributions.Normal(0.0, 1.0).log_prob(stays).flatten(1).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_a_fresh_network_proposes_nothing_and_its_gain_acts():
    conv = ZeroConv2d(3, 4)
    x = torch.randn(2, 3, 5, 5)
    assert not conv(x).any()
    with torch.no_grad():
        conv.weight.normal_()
        before = conv(x)
        conv.gain.fill_(1 / 3)
    torch.testing.assert_close(conv(x), before * torch.e)


@pytest.mark.parametrize(("memory", "grows"), [("store", True), ("recompute", False)])
def test_peak_memory_against_depth(memory: str, grows: bool):
    from measure import peak_bytes

    x = torch.zeros(8, 1, 16, 16)
    peaks = []
    for steps in (2, 8):
        model = build(scales=1, steps=steps, width=16, classes=None, memory=memory, shape=(1, 16, 16))
        model.loss(x).backward()  # the first batch starts the normalizations
        model.zero_grad(set_to_none=True)
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        peaks.append(peak_bytes(lambda model=model: model.loss(x).backward(), torch.device("cpu")) - gradients)
    assert (peaks[1] > 2 * peaks[0]) if grows else (peaks[1] < 1.05 * peaks[0])

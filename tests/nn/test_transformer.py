"""The causal transformer: what a place depends on, and steps with a cache against one pass over the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pygen.nn.layer_caches import Cache
from pygen.nn.transformer import CausalTransformer


def build(length: int = 6, **options: Any) -> CausalTransformer:
    """A small transformer in eval mode whose blocks are not the identity that they start as."""
    torch.manual_seed(1)
    net = CausalTransformer(length, **{"width": 8, "heads": 2, **options}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return net


def in_steps(net: CausalTransformer, x: Tensor, cache: Cache, blocks: list[int], **options: Any) -> Tensor:
    return torch.cat([net.step(part, cache, **options) for part in x.split(blocks, dim=1)], dim=1)


@given(length=st.integers(1, 7), layers=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), n=st.integers(1, 3))
def test_a_place_depends_on_itself_and_those_before(length, layers, heads, n):
    net = build(length, layers=layers, heads=heads).double()
    x = torch.randn(n, length, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), x)  # (length, 8, n, length, 8)
    depends = jacobian.abs().amax((1, 2, 4)) > 0
    assert torch.equal(depends, torch.ones(length, length, dtype=torch.bool).tril())


@settings(max_examples=15)
@given(data=st.data())
def test_steps_with_a_cache_are_one_pass_over_the_whole(data):
    length = data.draw(st.integers(1, 7))
    blocks = []
    while sum(blocks) < length:
        blocks.append(data.draw(st.integers(1, length - sum(blocks))))
    n, differentiable = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    net = build(8, layers=data.draw(st.integers(1, 2)), classes=3)
    x, labels = torch.randn(n, length, 8), torch.arange(n)
    heat = data.draw(st.sampled_from([None, torch.linspace(0.5, 2, n)]))
    with torch.no_grad():
        whole = net(x, labels, temperature=heat)
        stepped = in_steps(
            net, x, net.cache(n, differentiable=differentiable), blocks, condition=labels, temperature=heat
        )
    torch.testing.assert_close(stepped, whole)


def test_a_step_runs_on_every_backend(backend, device):
    net = build(5).to(device)
    x = torch.randn(2, 5, 8, device=device)
    with torch.no_grad():
        torch.testing.assert_close(in_steps(net, x, net.cache(2), [1, 3, 1]), net(x))


def test_gradients_go_through_a_differentiable_cache():
    net = build(4, classes=2).double()
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *net.parameters()]
    weight = torch.randn(2, 4, 8, dtype=torch.float64)
    expected = torch.autograd.grad((net(x) * weight).sum(), inputs)
    cache = net.cache(2, differentiable=True)
    actual = torch.autograd.grad((in_steps(net, x, cache, [2, 1, 1]) * weight).sum(), inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_tokens_are_taken_back():
    net = build()
    x, other = torch.randn(2, 6, 8), torch.randn(2, 2, 8)
    cache = net.cache(2)
    with torch.no_grad():
        net.step(x[:, :3], cache)
        net.step(other, cache)
        cache.crop(-2)
        torch.testing.assert_close(net.step(x[:, 3:], cache), net(x)[:, 3:])
        # A row may be ahead of another.
        cache.crop([4, 3])
        ahead, behind = net.step(torch.stack((x[0, 4:5], x[1, 3:4])), cache), net(x)
        torch.testing.assert_close(ahead, torch.stack((behind[0, 4:5], behind[1, 3:4])))


def test_what_does_not_fit_is_refused():
    net = build(4)
    for differentiable, refusal in (
        (False, "key has 2 tokens behind 2, but expected at most 3 in all, the capacity of the cache"),
        (True, "x has 2 tokens after 2, but expected at most 3 in all"),
    ):
        cache = net.cache(2, capacity=3, differentiable=differentiable)
        with torch.no_grad():
            assert net.step(torch.randn(2, 2, 8), cache).isfinite().all()
            with pytest.raises(ValueError, match=refusal):
                net.step(torch.randn(2, 2, 8), cache)


def test_labels_and_temperature_matter_to_their_own_row_alone():
    net = build(classes=3)
    x = torch.randn(3, 6, 8)
    labels, heat = torch.tensor([0, 1, 2]), torch.ones(3)
    before = net(x, labels, temperature=heat)
    torch.testing.assert_close(before, net(x, labels))
    for after in (
        net(x, torch.tensor([0, 2, 2]), temperature=heat),
        net(x, labels, temperature=torch.tensor([1.0, 3.0, 1.0])),
    ):
        assert torch.equal((after != before).flatten(1).any(1), torch.tensor([False, True, False]))
    torch.testing.assert_close(net(x), net(x, torch.full((3,), 3)))


def test_a_high_temperature_attends_to_all_alike():
    net = build()
    x = torch.randn(2, 6, 8)
    hot = net(x, temperature=torch.full((2,), 1e9))
    with torch.no_grad():
        for block in net.blocks:
            block.project_in.weight[:8] = 0  # the queries
            block.project_in.bias[:8] = 0
    torch.testing.assert_close(hot, net(x))


def test_blocks_start_as_identities():
    net = CausalTransformer(5, width=8)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(net(x), net.norm(x + net.positions))


def test_dropout_is_for_training():
    net = build(dropout=0.5)
    x = torch.randn(2, 6, 8)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


def test_compiles_without_a_break():
    net = build(4, classes=2)
    x, labels = torch.randn(2, 4, 8), torch.tensor([0, 1])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels), net(x, labels))
    step = torch.compile(net.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        cache = net.cache(2)
        stepped = torch.cat([step(part, cache, labels) for part in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(stepped, net(x, labels))


def test_autocast_in_a_step_and_in_one_pass():
    net = build(4)
    x = torch.randn(2, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = net(x)
        with torch.no_grad():
            stepped = in_steps(net, x, net.cache(2), [1] * 4)
    torch.testing.assert_close(stepped, whole.detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0, but expected at least 1"),
        ({"layers": 0}, "layers is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"width": 10, "heads": 4}, "width is 10, but expected a multiple of the 4 heads"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CausalTransformer(**{"length": 4, **options})


def test_bad_input_is_named():
    net = build(4)
    with pytest.raises(ValueError, match="x has 5 tokens, but expected at most 4"):
        net(torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match="condition was given, but the transformer was built without classes"):
        net(torch.randn(1, 4, 8), torch.zeros(1, dtype=torch.int64))

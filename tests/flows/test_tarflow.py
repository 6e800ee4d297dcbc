"""TarFlow: the exact density, the cached inverse against the naive one, guidance, noise and denoising."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pygen import ops
from pygen.flows import MetaBlock, TarFlow, TarFlowConfig


def awaken(module: torch.nn.Module, scatter: float = 0.2) -> Any:
    """The module in eval mode, its zero layers drawn anew: it starts as the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0, scatter)
    return module.eval()


def block(shape: tuple[int, int, int] = (1, 4, 4), **options: Any) -> MetaBlock:
    torch.manual_seed(0)
    made: MetaBlock = awaken(MetaBlock(shape, **{"width": 8, "heads": 2, "layers": 1, **options}))
    return made


def build(**options: Any) -> TarFlow:
    torch.manual_seed(0)
    small = {"shape": (1, 4, 4), "classes": 3, "width": 8, "heads": 2, "layers": 1, "blocks": 2}
    made: TarFlow = awaken(TarFlow(TarFlowConfig(**{**small, **options})))
    return made


def pictures(model: TarFlow, n: int) -> Tensor:
    k = torch.randint(model.config.levels, (n, *model.config.shape), generator=torch.Generator().manual_seed(3))
    return model.dequantize(k).to(next(model.parameters()).dtype)


def naive_inverse(
    step: MetaBlock, y: Tensor, context: Tensor | None, guidance: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """The whole transformer over all tokens known so far, once for each token."""
    z = step._tokens(y)
    x = z[:, :1]
    heat = z.new_full((len(z),), temperature)
    while x.shape[1] < z.shape[1]:
        proposed = step.propose(step.transformer(step.embed(x), context))[:, -1:]
        if guidance:
            other = step.propose(step.transformer(step.embed(x), None, temperature=heat))[:, -1:]
            proposed = (1 + guidance) * proposed - guidance * other
        a, b = proposed.chunk(2, dim=2)
        x = torch.cat((x, z[:, x.shape[1] : x.shape[1] + 1] * a.exp() + b), dim=1)
    return step._picture(x)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "patch"), [((1, 4, 4), 2), ((3, 2, 4), 2), ((2, 1, 3), 1)])
def test_log_determinants_are_those_of_the_jacobian(shape, patch, flip, guidance):
    step = block(shape, patch=patch, flip=flip, classes=3).double()
    label = torch.tensor([2])
    x = torch.randn(1, *shape, dtype=torch.float64)
    y, ladj = step(x, label)
    jacobian = torch.autograd.functional.jacobian(lambda x: step(x, label)[0].flatten(), x).reshape(y.numel(), -1)
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian).logabsdet)
    back, minus = step.inverse(y, label)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -ladj)
    _, ladj = step.inverse(y, label, guidance=guidance, temperature=0.7)
    jacobian = torch.autograd.functional.jacobian(
        lambda y: step.inverse(y, label, guidance=guidance, temperature=0.7)[0].flatten(), y
    ).reshape(y.numel(), -1)
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("flip", [False, True])
def test_a_token_depends_on_those_before_it_in_the_order_of_the_block(flip):
    step = block((1, 2, 6), flip=flip).double()
    x = torch.randn(1, 1, 2, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: step(x)[0], x).reshape(2, 3, 2, 2, 3, 2)
    depends = jacobian.abs().amax((0, 2, 3, 5)) > 0  # of the patch on the patch
    expected = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(depends, expected.triu() if flip else expected.tril())
    first = slice(4, 6) if flip else slice(0, 2)
    assert torch.equal(step(x)[0][..., first], x[..., first])


@settings(max_examples=15)
@given(
    rows=st.integers(1, 3), columns=st.integers(2, 3), channels=st.integers(1, 2), patch=st.integers(1, 2),
    n=st.integers(0, 3), guidance=st.sampled_from([0.0, 0.8]), flip=st.booleans(),
)  # fmt: skip
def test_the_cached_inverse_is_the_naive_one(rows, columns, channels, patch, n, guidance, flip):
    step = block((channels, rows * patch, columns * patch), patch=patch, flip=flip, layers=2, classes=3)
    y, labels = torch.randn(n, channels, rows * patch, columns * patch), torch.arange(n)
    expected = naive_inverse(step, y, labels, guidance, 2.0).detach()
    scale = float(expected.abs().max()) if n else 1.0
    with torch.no_grad():
        cached, ladj = step.inverse(y, labels, guidance=guidance, temperature=2.0)
    differentiable, same = step.inverse(y, labels, guidance=guidance, temperature=2.0)
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(differentiable, expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(ladj, same, rtol=1e-5, atol=1e-5)


def test_the_inverse_on_every_backend(backend, device):
    step = block(classes=3).to(device)
    x, labels = torch.randn(3, 1, 4, 4, device=device), torch.arange(3, device=device)
    with torch.no_grad():
        y, ladj = step(x, labels)
        back, minus = step.inverse(y, labels)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(minus, -ladj, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 0.6])
def test_gradients_of_the_inverse(guidance):
    step = block((1, 2, 3), patch=1, classes=2).double()
    labels = torch.tensor([0, 1])

    def inverse(y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return step.inverse(y, labels, guidance=guidance)

    y = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(inverse, (y, step.embed.weight, step.propose.weight, step.transformer.positions))


@pytest.mark.parametrize("memory", ["recompute", "checkpoint"])
def test_gradients_in_less_memory_are_those_of_store(memory):
    model = build(dropout=0.0, label_dropout=0.0).double()
    frugal = copy.deepcopy(model)
    frugal.stack.memory = memory
    x, labels = pictures(model, 4), torch.tensor([0, 1, 2, 0])
    found = []
    for each in (model, frugal):
        torch.manual_seed(5)
        found.append(
            torch.autograd.grad(each.loss(x, condition=labels), list(each.parameters()), materialize_grads=True)
        )
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=10)
@given(
    channels=st.integers(1, 3), rows=st.integers(1, 2), columns=st.integers(1, 3), blocks=st.integers(1, 3),
    levels=st.sampled_from([2, 17, 256]), n=st.integers(0, 3), gaussian=st.booleans(),
)  # fmt: skip
def test_shapes_and_round_trip(channels, rows, columns, blocks, levels, n, gaussian):
    noise = {"noise_std": 0.05, "margin": None, "denoise": True} if gaussian else {}
    model = build(shape=(channels, 2 * rows, 2 * columns + 2), blocks=blocks, levels=levels, **noise)
    x, labels = pictures(model, n), torch.arange(n)
    with torch.no_grad():
        z = model.encode(x, condition=labels)
        assert z.shape == x.shape
        assert torch.equal(model.decode(z, condition=labels), x)
        assert model.log_prob(x, condition=labels).shape == (n,)
    drawn = model.sample(n, condition=labels)
    assert drawn.shape == x.shape
    assert torch.equal(model.dequantize(model.quantize(drawn)), drawn)


def test_log_prob_is_the_density_in_the_cell_times_its_volume():
    model = build(levels=5).double()
    x, labels, ids = pictures(model, 3), torch.arange(3), torch.tensor([4, 9, 2])
    v = (torch.round((x + 1) * 2) + ops.uniform(ids, (1, 4, 4), seed=7).double()) / 5
    expected = model.flow.log_prob(v, labels) - 16 * math.log(5)
    torch.testing.assert_close(model.log_prob(x, condition=labels, ids=ids, seed=7), expected)


@pytest.mark.parametrize("noise_std", [0.02, 0.2, 1.0])
def test_log_prob_under_gaussian_noise_is_its_bound(noise_std):
    model = build(levels=5, margin=None, noise_std=noise_std).double()
    x, labels, ids = pictures(model, 3), torch.arange(3), torch.tensor([4, 9, 2])
    y = x + noise_std * ops.noise(ids, (1, 4, 4), seed=7).double()
    levels = torch.linspace(-1, 1, 5, dtype=torch.float64)
    near = torch.distributions.Normal(levels, noise_std).log_prob(y.unsqueeze(-1)).log_softmax(-1)
    drawn = near.gather(-1, ((x + 1) * 2).round().long().unsqueeze(-1)).sum((1, 2, 3, 4))
    density = model.flow.log_prob((2 * (y + 1) + 0.5) / 5, labels) + 16 * math.log(2 / 5)
    encoder = torch.distributions.Normal(x, noise_std).log_prob(y).sum((1, 2, 3))
    torch.testing.assert_close(model.log_prob(x, condition=labels, ids=ids, seed=7), density + drawn - encoder)


def test_denoising_follows_the_score():
    # With the identity for a flow, y = 2 v - 1 is standard normal, and its score is -y.
    model = TarFlow(TarFlowConfig(shape=(1, 2, 4), levels=256, margin=None, noise_std=0.3, classes=None)).eval()
    ids = torch.arange(5)
    y = ops.noise(ids, (1, 2, 4), seed=2)
    spread = 0.3 * 255 / 256  # the pictures' [-1, 1] is a level wider in v
    denoised = y - spread**2 * y
    expected = model.dequantize(((denoised + 1) / 2 * 256).floor().clamp(0, 255))
    torch.testing.assert_close(model.sample(5, seed=2, denoise=True), expected)
    stages = model.trajectory(5, seed=2, denoise=True)
    assert [stage.label for stage in stages[-2:]] == ["noisy", "X"]
    torch.testing.assert_close(stages[-2].values, y)
    assert not torch.equal(model.sample(5, seed=2), expected)


def test_a_sample_is_its_id_whatever_the_batch():
    model = build(margin=None, noise_std=0.1, denoise=True, guidance=0.5)
    whole = model.sample(6, seed=5)
    ids = torch.tensor([4, 0, 5])
    assert torch.equal(model.sample(3, ids=ids, seed=5), whole[ids])
    assert torch.equal(model.sample(3, ids=ids, condition=ids % 3, seed=5), whole[ids])
    assert not torch.equal(model.sample(6, seed=6), whole)
    assert not torch.equal(model.sample(3, ids=ids, condition=(ids + 1) % 3, seed=5), whole[ids])


def test_guidance_goes_from_the_prediction_without_label_beyond_that_with_it():
    model = build()
    z, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    first, second = (step for step in model.stack if isinstance(step, MetaBlock))
    with torch.no_grad():
        torch.testing.assert_close(first.inverse(z, labels, guidance=0.0), first.inverse(z, labels))
        guided = naive_inverse(first, naive_inverse(second, z, labels, 2.0), labels, 2.0)
    plain = model.sample(8, seed=4)
    assert torch.equal(model.sample(8, seed=4, guidance=0.0), plain)
    strong = model.sample(8, seed=4, guidance=2.0)
    assert not torch.equal(strong, plain)
    model.config = TarFlowConfig(**{**model.config_dict(), "guidance": 2.0})
    assert torch.equal(model.sample(8, seed=4), strong)
    torch.testing.assert_close(list(model._back(z, labels, 2.0))[-2].values, guided, rtol=1e-4, atol=1e-4)


def test_guidance_by_temperature_needs_no_labels():
    model = build(classes=None, guidance_temperature=3.0)
    assert not torch.equal(model.sample(8, guidance=1.0), model.sample(8))


def test_training_withholds_labels():
    model = build(label_dropout=0.5)
    x, labels = pictures(model, 32), torch.zeros(32, dtype=torch.int64)
    embedding = next(step for step in model.stack if isinstance(step, MetaBlock)).transformer.label

    def rows() -> list[bool]:
        model.zero_grad()
        model.loss(x, condition=labels).backward()
        return embedding.weight.grad.any(1).tolist()

    assert rows() == [True, False, False, False]
    model.train()
    assert rows() == [True, False, False, True]


def test_trajectory_goes_from_the_noise_to_the_sample():
    model = build()
    ids = torch.tensor([3, 8])
    stages = model.trajectory(2, ids=ids, seed=1)
    assert torch.equal(stages[0].values, ops.noise(ids, (1, 4, 4), seed=1))
    assert torch.equal(stages[-1].values, model.sample(2, ids=ids, seed=1))
    assert [stage.label for stage in stages] == ["Z", "3 MetaBlock", "2 MetaBlock", "X"]
    assert model.network_passes() == model.config.tokens == 4


def test_loss_decreases():
    torch.manual_seed(0)
    model = TarFlow(TarFlowConfig(width=16, blocks=2, layers=1))
    x = torch.full((32, 1, 8, 8), -1.0)
    x[:, :, 2:6, 2:6] = 1.0
    labels = torch.arange(32) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.loss(x, condition=labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_loss_is_the_mean_negative_log_likelihood_per_dimension():
    model = build().double()
    x, labels = torch.full((64, 1, 4, 4), -1.0, dtype=torch.float64), torch.arange(64) % 3
    losses = torch.stack([model.loss(x, condition=labels).detach() for _ in range(10)])
    nats = torch.stack([-model.log_prob(x, condition=labels, seed=s).detach().mean() / 16 for s in range(10)])
    assert abs(losses.mean() - nats.mean()) < 5 * (losses.var() / 10 + nats.var() / 10).sqrt()


def test_training_in_bfloat16():
    model = build().train()
    x, labels = pictures(model, 16), torch.arange(16) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(x, condition=labels)
        drawn = model.sample(4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert drawn.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_copy_samples_the_same():
    model = build()
    other = TarFlow(TarFlowConfig(**model.config_dict())).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.sample(2), model.sample(2))
    stored = sum(tensor.numel() for tensor in model.state_dict().values())
    assert stored == sum(parameter.numel() for parameter in model.parameters())


def test_compiles_without_a_break():
    model = build(blocks=1, margin=None, noise_std=0.1)
    x, labels = pictures(model, 4), torch.tensor([0, 1, 2, 0])
    options = {"fullgraph": True, "backend": "aot_eager"}
    log_prob = torch.compile(model.log_prob, **options)(x, condition=labels)
    torch.testing.assert_close(log_prob, model.log_prob(x, condition=labels))
    model.train()
    torch.manual_seed(1)
    torch.compile(model.loss, **options)(x, condition=labels).backward()
    gradient = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(1)
    model.loss(x, condition=labels).backward()
    torch.testing.assert_close(gradient, [p.grad for p in model.parameters() if p.grad is not None])


def test_bad_input_is_named():
    model = build()
    with pytest.raises(ValueError, match=r"x has shape \(3,\), but expected \(n, 1, 4, 4\)"):
        model.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="condition is None"):
        model.loss(torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match="player is 'critic'"):
        model.loss(torch.zeros(3, 1, 4, 4), player="critic")
    with pytest.raises(ValueError, match="steps is 7, but TarFlow always takes 4 passes"):
        model.sample(2, steps=7)
    with pytest.raises(ValueError, match="denoise is True, but expected False: without noise_std"):
        model.sample(2, denoise=True)
    with pytest.raises(ValueError, match="guidance is -1"):
        model.sample(2, guidance=-1.0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 1, 4, 2\), but expected \(n, 1, 4, 4\)"):
        block()(torch.zeros(3, 1, 4, 2))
    with pytest.raises(ValueError, match=r"shape is \(1, 4, 4\) with patch 3, but expected"):
        block(patch=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 8, 7)}, r"shape is \(1, 8, 7\) with patch 2, but expected .* divisible by it"),
        ({"patch": 8}, "with patch 8, but expected .* two patches or more"),
        ({"patch": 0}, "patch is 0"),
        ({"blocks": 0}, "blocks is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1"),
        ({"memory": "recompute", "dropout": 0.1}, "memory is 'recompute' with dropout 0.1, but expected dropout 0"),
        ({"noise_std": 0.1}, "margin is 0.01 with noise_std 0.1, but expected None"),
        ({"noise_std": 0.0, "margin": None}, "noise_std is 0.0"),
        ({"denoise": True}, "denoise is True"),
        ({"guidance": 1.0, "classes": None}, "guidance is 1.0, but expected 0 without classes"),
        ({"guidance": 1.0, "label_dropout": 0.0}, "guidance is 1.0 with label_dropout 0"),
        ({"guidance_temperature": 0.0}, "guidance_temperature is 0.0"),
    ],
)
def test_bad_configuration_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        TarFlowConfig(**options)

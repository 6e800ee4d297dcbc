"""The discretized mixture of logistics against PixelCNN++'s loss as it is usually written, eager and compiled; its
sampler against the Gumbel and inverse draws of the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case, compiled, peak_bytes
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pygen import ops

MIXTURES = 10


def eager(x: Tensor, parameters: Tensor) -> Tensor:
    """Salimans et al. 2017, arXiv:1701.05517, with the cases of their code: both ends, and tiny differences."""
    logits, rest = parameters[:, :MIXTURES], parameters[:, MIXTURES:].unflatten(1, (3, 3, MIXTURES))
    log_scale, c = rest[:, :, 1].clamp(min=-7), rest[:, :, 2].tanh()
    red, green = x[:, 0:1], x[:, 1:2]
    mean = torch.stack(
        (rest[:, 0, 0], rest[:, 1, 0] + c[:, 0] * red, rest[:, 2, 0] + c[:, 1] * red + c[:, 2] * green), 1
    )
    value = x[:, :, None]
    centre, inverse = value - mean, (-log_scale).exp()
    plus, minus = inverse * (centre + 1 / 255), inverse * (centre - 1 / 255)
    delta = plus.sigmoid() - minus.sigmoid()
    middle = inverse * centre
    density = middle - log_scale - 2 * softplus(middle)
    inner = torch.where(delta > 1e-5, delta.clamp(min=1e-12).log(), density - 4.848)
    ends = torch.where(value > 0.999, -softplus(minus), inner)
    log_prob = torch.where(value < -0.999, logsigmoid(plus), ends).sum(1) + logits.log_softmax(1)
    return log_prob.logsumexp(1)


def eager_draw(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """A component by Gumbel's trick, then the colours by the inverse of the logistic distribution; and the probability
    of what was drawn."""
    logits, rest = parameters[:, :MIXTURES], parameters[:, MIXTURES:].unflatten(1, (3, 3, MIXTURES))
    gumbel = -(-torch.rand_like(logits).log()).log()
    chosen = (logits + gumbel).argmax(1)[:, None, None, None].expand(-1, 3, 3, 1)
    mean, log_scale, c = rest.gather(3, chosen)[..., 0].unbind(2)
    u = torch.rand_like(mean).clamp(1e-5, 1 - 1e-5)
    noise = log_scale.clamp(min=-7).exp() * (u.log() - (1 - u).log())
    c = c.tanh()
    red = (mean[:, 0] + noise[:, 0]).clamp(-1, 1)
    green = (mean[:, 1] + noise[:, 1] + c[:, 0] * red).clamp(-1, 1)
    blue = (mean[:, 2] + noise[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
    x = ((torch.stack((red, green, blue), 1) + 1) * 127.5).round() / 127.5 - 1
    return x, eager(x, parameters)


def cases(device: torch.device) -> Iterator[Case]:
    """A batch of CIFAR-10's size, parameters as an untrained network proposes them; pixels of a step of sampling."""
    x = torch.randint(256, (16, 3, 32, 32), device=device) * (2 / 255) - 1
    parameters = torch.randn(16, 10 * MIXTURES, 32, 32, device=device)
    shape = "(16, 3, 32, 32) M=10"
    pixels = 16 * 32 * 32
    yield Case(
        "logistics forward", shape,
        lambda: ops.discretized_logistics_log_prob(x, parameters),
        {"eager": lambda: eager(x, parameters), "compiled": partial(compiled(eager), x, parameters)},
        4 * pixels * (10 * MIXTURES + 4),
    )  # fmt: skip
    leaf = parameters.clone().requires_grad_()

    def train(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(function(x, leaf).sum(), leaf)[0]

    yield Case(
        "logistics forward + backward", shape,
        lambda: train(ops.discretized_logistics_log_prob),
        {"eager": lambda: train(eager), "compiled": partial(train, compiled(eager))},
        # forward, then the backward reads x and the parameters again and writes the gradients
        4 * pixels * (30 * MIXTURES + 12),
        {"eager": 8.0},
        peak=lambda work: peak_bytes(work, device),
        peak_targets={"eager": 5.0},
    )  # fmt: skip
    for rows in (1, 16, 256):
        pixel, ids = parameters[:, :, :4, :4].permute(0, 2, 3, 1).reshape(-1, 10 * MIXTURES)[:rows], torch.arange(rows)
        ids = ids.to(device)
        yield Case(
            "draw a pixel", f"({rows}, 100)",
            lambda pixel=pixel, ids=ids: ops.sample_discretized_logistics(pixel, seed=0, sample_ids=ids, position=0),
            {"eager": lambda pixel=pixel: eager_draw(pixel), "compiled": partial(compiled(eager_draw), pixel)},
            4 * pixel.numel(),
        )  # fmt: skip

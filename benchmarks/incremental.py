"""Converted networks against the naive loop, one pass of the same batch, and queues written in Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measure import Case
from torch import Tensor, nn

from pygen import ops
from pygen.autoregressive import (
    GatedPixelCNN,
    GatedPixelCNNConfig,
    PixelCNNPP,
    PixelCNNPPConfig,
    WaveNet,
    WaveNetConfig,
)
from pygen.autoregressive.incremental import Incremental, incremental

# The naive loop and the queues take minutes: some positions are timed, and the targets are scaled by how many.
POSITIONS = 16
QUEUE_STEPS = 200


def randomize(model: nn.Module) -> None:
    """Weights of a size that trained ones have; new heads are zero."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def naive(net: Incremental, forward: Callable[[Tensor], Tensor], n: int, draw: Callable[..., None]) -> None:
    """A pass through the whole network for each of some sites of the picture, evenly spread, and its draws."""
    ids = torch.arange(n, device=net.device)
    tokens = torch.zeros(n, net.length, dtype=torch.int64, device=net.device)
    sites = net.length // net.geometry.channels
    for site in range(0, sites, sites // POSITIONS):
        draw(forward(net.pictures(tokens)).flatten(2)[:, :, site], tokens, site, ids)


def draw_level(outputs: Tensor, tokens: Tensor, site: int, ids: Tensor) -> None:
    tokens[:, site], _ = ops.sample_logits(outputs, seed=0, sample_ids=ids, position=site)


def draw_pixel(outputs: Tensor, tokens: Tensor, site: int, ids: Tensor) -> None:
    x, _ = ops.sample_discretized_logistics(outputs, seed=0, sample_ids=ids, position=3 * site)
    tokens[:, 3 * site : 3 * site + 3] = ((x + 1) * 127.5).round().long()


class Queues:
    """A WaveNet whose layers keep what they read `dilation` steps later in queues, in PyTorch (Paine et al. 2016,
    arXiv:1611.09482)."""

    def __init__(self, model: WaveNet, n: int) -> None:
        self.model, self.n = model, n
        self.layers: list[Any] = list(model.layers)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        model, n = self.model, self.n
        ids = torch.arange(n)
        first = model.first.weight
        # The first convolution reads two samples; each layer its input now and `dilation` steps ago.
        before = [torch.zeros(n, 1), torch.zeros(n, 1)]
        queues = [
            deque([torch.zeros(n, layer.convolution.in_channels)] * layer.dilation) for layer in self.layers
        ]  # fmt: skip
        tokens = torch.zeros(n, QUEUE_STEPS, dtype=torch.int64)
        for position in range(QUEUE_STEPS):
            state = model.first.bias + before[0] @ first[:, :, 0].T + before[1] @ first[:, :, 1].T
            total = torch.zeros(n, model.config.skip)
            for layer, queue in zip(self.layers, queues, strict=True):
                queue.append(state)
                kernel = layer.convolution.weight
                both = torch.addmm(layer.convolution.bias, queue.popleft(), kernel[:, :, 0].T)
                value, gate = torch.addmm(both, state, kernel[:, :, 1].T).chunk(2, 1)
                z = value.tanh() * gate.sigmoid()
                total = total + F.linear(z, layer.skip.weight[:, :, 0], layer.skip.bias)
                if layer.residual is not None:
                    state = state + F.linear(z, layer.residual.weight[:, :, 0], layer.residual.bias)
            hidden = F.relu(F.linear(total.relu(), model.hidden.weight[:, :, 0], model.hidden.bias))
            logits = F.linear(hidden, model.head.weight[:, :, 0], model.head.bias)
            tokens[:, position], _ = ops.sample_logits(logits, seed=0, sample_ids=ids, position=position)
            before = [before[1], tokens[:, position, None].float() * (2 / 255) - 1]
        return tokens


def cases(device: torch.device) -> Iterator[Case]:
    """Pictures and sound, one sample and a batch."""
    torch.manual_seed(0)
    gated = GatedPixelCNN(
        GatedPixelCNNConfig(shape=(1, 28, 28), layers=7, width=64, head=64, levels=256, classes=None)
    ).eval().to(device)  # fmt: skip
    randomize(gated)
    net = incremental(gated, (1, 28, 28), levels=256)
    share = POSITIONS / net.length
    for n in (1, 16, 64):
        x = torch.rand(n, 1, 28, 28, device=device) * 2 - 1
        targets = {"one pass": 1 / 1.5, f"naive, {POSITIONS} of 784": (700 if device.type == "cpu" else 80) * share}
        yield Case(
            "gated pixelcnn, 7 x 64", f"({n}, 1, 28, 28)", lambda n=n: net.sample(n),
            {
                "one pass": lambda x=x: gated(x),
                f"naive, {POSITIONS} of 784": lambda n=n: naive(net, gated, n, draw_level),
            },
            targets=targets,
        )  # fmt: skip

    plus = PixelCNNPP(PixelCNNPPConfig(shape=(3, 32, 32), levels=256, classes=None, width=64)).eval().to(device)
    randomize(plus)
    net_plus = incremental(plus, (3, 32, 32), levels=256, logistics=True)
    x = torch.rand(16, 3, 32, 32, device=device) * 2 - 1
    yield Case(
        "pixelcnn++, 3 x 5 x 64", "(16, 3, 32, 32)", lambda: net_plus.sample(16),
        {
            "one pass": lambda: plus(x),
            f"naive, {POSITIONS} of 1024": lambda: naive(net_plus, plus, 16, draw_pixel),
        },
        targets={f"naive, {POSITIONS} of 1024": 500 * POSITIONS / 1024},
    )  # fmt: skip

    length = 16_000
    wave = WaveNet(WaveNetConfig(shape=(1, 1, length), levels=256, classes=None, layers=10, stacks=3)).eval().to(device)
    randomize(wave)
    net_wave = incremental(wave, (1, 1, length), levels=256)
    for n in (1, 8):
        yield Case(
            "wavenet, 10 x 3", f"({n}, {length})", lambda n=n: net_wave.sample(n),
            {f"queues, {QUEUE_STEPS} of {length}": Queues(wave, n)},
            targets={f"queues, {QUEUE_STEPS} of {length}": 20 * QUEUE_STEPS / length},
        )  # fmt: skip

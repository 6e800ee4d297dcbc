"""The inverse of a masked autoregressive flow against its own forward pass, and against nflows' and zuko's inverses.

Theirs take one pass through the network for each input. A few of these passes are timed, not all: the name says how
many of how many, and the target is scaled to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import nflows.transforms.autoregressive as nflows_autoregressive
import torch
import zuko.flows
from measure import Case
from torch import Tensor

from pygen.flows.autoregressive import MaskedAutoregressive
from pygen.nn.made import MADE
from pygen.ops import MaskedAffine, MaskedSpline
from pygen.ops.masked import plan_of

PASSES = 8


def of_nflows(transform: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """The first passes of nflows' inverse."""
    x, ladj = torch.zeros_like(y), y
    for _ in range(PASSES):
        x, ladj = transform._elementwise_inverse(y, transform.autoregressive_net(x))
    return x, ladj


def train(function: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, parameters: list[Tensor]) -> object:
    x, ladj = function(y)
    return torch.autograd.grad(x.sum() + ladj.sum(), [y, *parameters])


def cases(device: torch.device) -> Iterator[Case]:
    """MNIST's size with two residual blocks, a smaller one, and splines on a table."""
    for features, hidden, batch, bins in ((784, 1024, 64, 0), (784, 1024, 1, 0), (64, 512, 64, 0), (64, 128, 512, 8)):
        if bins:
            elementwise: MaskedAffine | MaskedSpline = MaskedSpline(bins, tails="linear", domain=(-3.0, 3.0))
            peer = nflows_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features, hidden, num_bins=bins, tails="linear", tail_bound=3.0
            )
        else:
            elementwise = MaskedAffine("softplus", epsilon=1e-3)
            peer = nflows_autoregressive.MaskedAffineAutoregressiveTransform(features, hidden)
        per_input = elementwise.per_input if isinstance(elementwise, MaskedSpline) else 2
        ours = MaskedAutoregressive(MADE(features, width=hidden, per_input=per_input), elementwise)
        for transform in (ours, peer):
            transform.to(device).eval()
            for parameter in transform.parameters():
                torch.nn.init.uniform_(parameter, -1 / hidden**0.5, 1 / hidden**0.5)
        zukos = (zuko.flows.NSF if bins else zuko.flows.MAF)(
            features, transforms=1, hidden_features=(hidden, hidden, hidden), **({"bins": bins} if bins else {})
        ).transform.transforms[0].to(device)  # fmt: skip
        zukos.passes = PASSES
        y = torch.randn(batch, features, device=device)
        largest = features == 784 and batch == 64
        of = f"{PASSES} of {features} passes"
        kind = f"{'spline' if bins else 'affine'}, D {features}, H {hidden}, batch {batch}"
        plan = plan_of(ours.made.network, elementwise)
        weights = 4 * sum(packing.index.numel() for packing in plan.programs["inverse"].packings)
        yield Case(
            "MAF inverse", kind, lambda ours=ours, y=y: ours.inverse(y),
            {
                "own forward, cached": lambda ours=ours, y=y: ours(y),
                f"nflows, {of}": lambda peer=peer, y=y: of_nflows(peer, y),
                f"zuko, {of}": lambda zukos=zukos, y=y: zukos().inv(y),
            },
            weights + 8 * y.numel(),
            {"own forward, cached": 0.25, f"nflows, {of}": 400 * PASSES / features} if largest else {},
        )  # fmt: skip
        if batch == 1:
            continue
        leaf = y.clone().requires_grad_()
        yield Case(
            "MAF inverse + backward", kind,
            lambda ours=ours, leaf=leaf: train(ours.inverse, leaf, list(ours.parameters())),
            {
                "own forward + backward": lambda ours=ours, leaf=leaf: train(ours, leaf, list(ours.parameters())),
                f"nflows, {of}": lambda peer=peer, leaf=leaf: train(
                    partial(of_nflows, peer), leaf, list(peer.parameters())
                ),
            },
        )  # fmt: skip

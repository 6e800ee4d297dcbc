"""The small transforms of a Glow step, against eager PyTorch and torch.compile: squeezing and Haar in kernels; actnorm
and the invertible 1x1 convolution, which PyTorch's own operations serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from measure import Case, compiled
from torch import Tensor, nn

from pygen import flows, ops

# A picture, and what two scales of a Glow on 32 x 32 see.
SHAPES = [(64, 3, 32, 32), (64, 12, 16, 16), (64, 48, 8, 8)]
_HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))


def squeeze(x: Tensor) -> Tensor:
    """As flow libraries write it: a view, a permutation and a copy."""
    n, c, height, width = x.shape
    blocks = x.view(n, c, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, height // 2, width // 2)


def unsqueeze(y: Tensor) -> Tensor:
    n, c, height, width = y.shape
    corners = y.view(n, 2, 2, c // 4, height, width)
    return corners.permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * height, 2 * width)


def haar(x: Tensor) -> Tensor:
    """As FrEIA writes it: a strided convolution of each channel by itself."""
    kernel = x.new_tensor(_HAAR).view(4, 1, 2, 2) / 2
    return F.conv2d(x, kernel.repeat(x.shape[1], 1, 1, 1), stride=2, groups=x.shape[1])


def haar_sums(x: Tensor) -> Tensor:
    """The reference, which the compiler fuses best."""
    return ops.haar_reference(x)


def unhaar(y: Tensor) -> Tensor:
    return ops.haar_reference(y, inverse=True)


def train(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(function(x), x, grad)[0]


def train_layer(layer: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, x: Tensor, grads: list[Tensor]) -> None:
    torch.autograd.grad(layer(x), [x, *module.parameters()], grads)


def calling(module: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function, because what modules of a class share would be compiled once for all."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = module(x)
        return result

    return call


class PlainNorm(nn.Module):
    """Actnorm in the fewest operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.shift = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj = self.log_scale.sum() * x.shape[2:].numel()
        return torch.addcmul(self.shift, x, self.log_scale.exp()), ladj.expand(len(x))


class PlainLinear(nn.Module):
    """Glow's invertible 1x1 convolution as it is usually written: PLU factors, a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit = torch.eye(len(self.lower), device=x.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        weight = self.permutation @ (self.lower.tril(-1) + unit) @ upper
        ladj = self.log_diagonal.sum() * x.shape[2:].numel()
        return F.conv2d(x, weight[:, :, None, None]), ladj.expand(len(x))


def cases(device: torch.device) -> Iterator[Case]:
    for shape in SHAPES:
        yield from _reshapes(shape, device)
        yield from _layers(shape, device)


def _reshapes(shape: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    x = torch.randn(shape, device=device)
    y = ops.haar(x)
    once = 2 * 4 * x.numel()
    label = str(shape)
    for name, ours, back, rivals, back_rivals in (
        ("squeeze", ops.squeeze, partial(ops.squeeze, inverse=True), {"eager": squeeze}, {"eager": unsqueeze}),
        ("haar", ops.haar, partial(ops.haar, inverse=True), {"eager": haar_sums, "convolution": haar},
         {"eager": unhaar}),
    ):  # fmt: skip
        rivals = rivals | {"compiled": compiled(rivals["eager"])}
        back_rivals = back_rivals | {"compiled": compiled(back_rivals["eager"])}
        yield Case(
            f"{name} forward", label, partial(ours, x), {key: partial(rival, x) for key, rival in rivals.items()}, once
        )
        yield Case(
            f"{name} inverse", label, partial(back, y), {key: partial(rival, y) for key, rival in back_rivals.items()},
            once,
        )  # fmt: skip
        leaf = x.clone().requires_grad_()
        rivals["compiled"] = compiled(rivals["eager"])
        yield Case(
            f"{name} forward + backward", label, partial(train, ours, leaf, y),
            {key: partial(train, rival, leaf, y) for key, rival in rivals.items()}, 2 * once,
        )  # fmt: skip


def _layers(shape: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    x = torch.randn(shape, device=device)
    leaf = x.clone().requires_grad_()
    grads = [torch.randn(shape, device=device), torch.randn(len(x), device=device)]
    for name, ours, plain in (
        ("actnorm", flows.ActNorm(shape[1]), PlainNorm(shape[1])),
        ("1x1 convolution", flows.InvertibleLinear(shape[1]), PlainLinear(shape[1])),
    ):
        ours, plain = ours.to(device), plain.to(device)
        ours(x)  # the first batch
        fused, trained = (compiled(calling(plain)) for _ in range(2))
        once = 2 * 4 * x.numel()
        rivals = {"eager": partial(plain, x), "compiled": partial(fused, x)}
        yield Case(f"{name} forward", str(shape), partial(ours, x), rivals, once)
        yield Case(
            f"{name} forward + backward", str(shape), partial(train_layer, ours, ours, leaf, grads),
            {
                "eager": partial(train_layer, plain, plain, leaf, grads),
                "compiled": partial(train_layer, trained, plain, leaf, grads),
            },
            5 * 4 * x.numel(),
        )  # fmt: skip

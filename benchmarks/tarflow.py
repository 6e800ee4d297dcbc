"""TarFlow's metablock back to data: cached, against the transformer run again for each token, and one forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Case
from torch import Tensor

from pygen.flows import MetaBlock


def rerun(block: MetaBlock, y: Tensor) -> Tensor:
    """The inverse without a cache: the transformer over all tokens known so far, for each token."""
    z = block._tokens(y)
    x = z[:, :1]
    while x.shape[1] < z.shape[1]:
        a, b = block.propose(block.transformer(block.embed(x))[:, -1:]).chunk(2, dim=2)
        x = torch.cat((x, z[:, x.shape[1] : x.shape[1] + 1] * a.exp() + b), dim=1)
    return block._picture(x)


def cases(device: torch.device) -> Iterator[Case]:
    """The digits' block and larger ones. One forward costs a share of the inverse: its ratio is that share.

    One picture alone waits for the calls of small operations, or for the weights, which every step reads anew.
    """
    settings = [
        (1, (1, 8, 8), 2, 64, 1), (100, (1, 8, 8), 2, 64, 1), (1, (3, 32, 32), 4, 256, 4),
        (16, (3, 32, 32), 4, 256, 4), (1, (3, 32, 32), 2, 256, 4),
    ]  # fmt: skip
    for n, shape, patch, width, layers in settings:
        block = MetaBlock(shape, patch=patch, width=width, layers=layers).to(device).eval()
        with torch.no_grad():
            for parameter in block.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.02)
        y = torch.randn(n, *shape, device=device)
        tokens = shape[1] * shape[2] // patch**2
        yield Case(
            "TarFlow block, inverse", f"{n} pictures, {tokens}x{width}x{layers}",
            lambda block=block, y=y: block.inverse(y),
            {"run again": lambda block=block, y=y: rerun(block, y), "one forward": lambda block=block, y=y: block(y)},
            targets={"run again": tokens / 8} if n > 1 else {},
        )  # fmt: skip

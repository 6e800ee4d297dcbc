"""Transfer between two sets of pictures through the latent space that they share, without pairs.

One conditional Glow (Kingma & Dhariwal 2018, arXiv:1807.03039) learns both sets, with the set as its condition. A
picture of the first goes to z = f(x; first) and comes back as f^{-1}(z; second): what the sets share lies in z, and
what tells them apart in the condition (Grover et al. 2020, AlignFlow, arXiv:1905.12892). The sets: handwritten digits,
and the same kind of digits in white ink on black paper, slanted. No digit is in both.

    python examples/transfer.py --out transfer.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from pygen.flows import Glow, GlowConfig
from pygen.workbench.classifier import accuracy, train_classifier
from pygen.workbench.figures import sheet_png

LEVELS = 17


def slanted(x: Tensor) -> Tensor:
    """Sheared by half a pixel per row and inverted, as grey values of 17 levels in [-1, 1]."""
    shear = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(shear, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return -((moved + 1) * 8).round() / 8 + 1


def sets() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures (n, 1, 8, 8) of the first set with the digits that they show, and the same of the second."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, second = order.tensor_split(2)
    return x[first], labels[first], slanted(x[second]), labels[second]


def transfer(model: Glow, x: Tensor, source: int, target: int) -> Tensor:
    """The pictures of one set as they would be in the other."""
    z = model.encode(x, condition=torch.full((len(x),), source))
    return model.decode(z, condition=torch.full((len(x),), target))


def train(model: Glow, first: Tensor, second: Tensor, *, steps: int, batch: int = 64) -> list[float]:
    """Maximum likelihood of both sets; the loss in nats per dimension of each step."""
    x, which = torch.cat((first, second)), torch.cat((torch.zeros(len(first)), torch.ones(len(second)))).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        loss = model.loss(x[rows], condition=which[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--out", type=Path, default=Path("transfer.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    first, digits, second, others = sets()
    config = GlowConfig(
        shape=(1, 8, 8), levels=LEVELS, classes=2, labels="steps", scales=2, steps=8, width=64, margin=0.05
    )
    model = Glow(config)
    train(model, first, second, steps=options.steps)
    model.eval()
    with torch.no_grad():
        moved = transfer(model, first, 0, 1)
        back = transfer(model, moved, 1, 0)
    judge = train_classifier(second, others, 10)
    print("digits of the first set, read by a classifier that knows the second set alone:")
    for name, pictures in (("as they are", first), ("transferred", moved), ("slanted by the formula", slanted(first))):
        print(f"  {name:24} {accuracy(judge, pictures, digits):5.1%} read right (chance 10%)")
    print(f"there and back again: {float((back == first).float().mean()):.1%} of the grey values as they were")
    shown = torch.stack([torch.nonzero(digits == k)[1, 0] for k in range(10)])
    options.out.write_bytes(sheet_png(torch.cat((first[shown], moved[shown], slanted(first[shown]))), columns=10))
    print(f"{options.out}: first set, transferred, and what the formula gives")


if __name__ == "__main__":
    main()

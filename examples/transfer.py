"""Transfer between sets of pictures through the latent space that they share, without pairs: the same hand, another
digit.

One conditional Glow (Kingma & Dhariwal 2018, arXiv:1807.03039) learns ten sets, all 0s, all 1s and so on, with the set
as its condition. A picture of one set goes to z = f(x; source) and comes back as f^{-1}(z; target). What tells the sets
apart is in the condition, and what they share, thickness and slant of a hand, is left for z to hold (as in Grover et
al. 2020, AlignFlow, arXiv:1905.12892, where two flows share a z). Nobody told the model which pictures are by one hand.

    python examples/transfer.py --out transfer.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pygen.flows import Glow, GlowConfig
from pygen.workbench.classifier import accuracy, train_classifier
from pygen.workbench.figures import sheet_png

SETS = 10
LEVELS = 17
FEATURES = ("ink", "slant", "width")


def pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits (n, 1, 8, 8) to learn from and the set of each, then the same of 300 that are held out."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, training = order.tensor_split([300])
    of = torch.tensor(digits.target)
    return x[training], of[training], x[held_out], of[held_out]


def transfer(model: Glow, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The pictures, each of the set source[i], as they would be in target[i]."""
    return model.decode(model.encode(x, condition=source), condition=target)


def train(model: Glow, x: Tensor, of: Tensor, *, steps: int, batch: int = 64) -> list[float]:
    """Maximum likelihood of all sets; the loss in nats per dimension of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        loss = model.loss(x[rows], condition=of[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def features(x: Tensor) -> Tensor:
    """(n, 3): how much ink there is, how it leans (the regression of its column on its row), and how wide it lies."""
    weight = (x[:, 0] + 1) / 2
    ink = weight.sum((1, 2))
    places = torch.arange(weight.shape[-1], dtype=weight.dtype)
    row = places[None, :, None] - ((weight * places[:, None]).sum((1, 2)) / ink)[:, None, None]
    column = places[None, None, :] - ((weight * places).sum((1, 2)) / ink)[:, None, None]
    slant = (weight * row * column).sum((1, 2)) / (weight * row.square()).sum((1, 2))
    width = ((weight * column.square()).sum((1, 2)) / ink).sqrt()
    return torch.stack((ink, slant, width), 1)


def correlation(x: Tensor, of: Tensor, moved: Tensor, target: Tensor) -> Tensor:
    """(3,): how well the features of a picture, less the mean of its set, tell those of the transferred one."""
    own, others = centred(features(x), of), centred(features(moved), target)
    return (own * others).sum(0) / (own.norm(dim=0) * others.norm(dim=0))


def centred(values: Tensor, of: Tensor) -> Tensor:
    counts = torch.zeros(SETS).index_add(0, of, torch.ones(len(of)))
    means = torch.zeros(SETS, values.shape[1]).index_add(0, of, values) / counts.clamp_min(1)[:, None]
    return values - means[of]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--out", type=Path, default=Path("transfer.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    x, of, unseen, source = pictures()
    model = Glow(
        GlowConfig(
            shape=(1, 8, 8), levels=LEVELS, classes=SETS, labels="steps", scales=2, steps=8, width=64, margin=0.05
        )
    )
    train(model, x, of, steps=options.steps)
    model.eval()
    judge = train_classifier(x, of, SETS)
    target = (source + torch.arange(len(source)) % (SETS - 1) + 1) % SETS
    with torch.no_grad():
        moved = transfer(model, unseen, source, target)
        shown = torch.stack([torch.nonzero(source == k)[0, 0] for k in (2, 3, 5, 8)])
        rows = [
            torch.cat((unseen[i : i + 1], transfer(model, unseen[i].expand(SETS, -1, -1, -1), source[i].expand(SETS),
                                                   torch.arange(SETS))))
            for i in shown
        ]  # fmt: skip
    print(f"{len(unseen)} unseen digits, each transferred to another set:")
    print(f"  read as the target by a classifier of real digits: {accuracy(judge, moved, target):5.1%} (real digits "
          f"as what they are: {accuracy(judge, unseen, source):5.1%})")  # fmt: skip
    kept = zip(FEATURES, correlation(unseen, source, moved, target).tolist(), strict=True)
    print("  correlation with the original, within a set: " + ", ".join(f"{name} {value:.2f}" for name, value in kept))
    options.out.write_bytes(sheet_png(torch.cat(rows), columns=SETS + 1))
    print(f"{options.out}: in each row an original, then the same hand's 0 to 9")


if __name__ == "__main__":
    main()

"""Super-resolution with a conditional flow: many sharp pictures for one blurred one.

p(x | y) of a picture x given its 2 x 2 averages y (Lugmayr et al. 2020, SRFlow, arXiv:2006.14200). The context of the
flow is y: every coupling reads it, and injectors scale and shift by it. A flow gives a density, so one can draw several
answers, and turn a temperature: 0 for the most likely prior point, 1 for the whole variety.

    python examples/super_resolution.py --out super_resolution.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from pygen import ops
from pygen.flows import (
    ActNorm,
    AffineCoupling,
    AffineInjector,
    Flow,
    Inverse,
    InvertibleLinear,
    Squeeze,
    StandardNormal,
    Transform,
)
from pygen.nn.conditioner import ConvConditioner, PictureConditioner
from pygen.workbench.figures import sheet_png

SIZE = 16  # of what the flow learns from
SHOWN = 48


def photographs() -> tuple[Tensor, Tensor]:
    """Two photographs, halved in size, (3, height, width) in [-1, 1], cut into what trains (left) and tests (right)."""
    pictures = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in load_sample_images().images]
    both = torch.stack(pictures).float() / 127.5 - 1
    both = F.avg_pool2d(both, 2)
    cut = both.shape[-1] * 3 // 4
    return both[..., :cut], both[..., cut:]


def crops(pictures: Tensor, n: int, size: int, generator: torch.Generator) -> Tensor:
    """n random crops, (n, 3, size, size)."""
    which, top, left = (
        torch.randint(limit, (n,), generator=generator)
        for limit in (len(pictures), pictures.shape[-2] - size, pictures.shape[-1] - size)
    )
    return torch.stack([pictures[k, :, i : i + size, j : j + size] for k, i, j in zip(which, top, left, strict=True)])


def build(width: int = 48, couplings: int = 8) -> Flow:
    """A one-scale Glow whose layers read the low-resolution picture."""
    channels = 12  # of a squeezed picture, which has the size of its averages
    layers: list[Transform] = [Squeeze()]
    for k in range(couplings):
        layers += [ActNorm(channels), InvertibleLinear(channels)]
        layers.append(AffineInjector(ConvConditioner(3, 2 * channels, width=width // 2, blocks=1)))
        conditioner = PictureConditioner(channels // 2, channels, context_channels=3, width=width, blocks=1)
        layers.append(AffineCoupling(conditioner, flip=k % 2 == 1, activation="tanh", limit=2.0))
    return Flow([*layers, Inverse(Squeeze())], StandardNormal((3, SIZE, SIZE)))


def enlarge(flow: Flow, low: Tensor, *, temperature: float, ids: Tensor) -> Tensor:
    """Draws of p(x | low), twice as high and wide as low (n, 3, h, w), from prior points scaled by the temperature.

    The layers are convolutions, so the flow enlarges pictures of any size.
    """
    _, channels, height, width = low.shape
    z = temperature * ops.noise(ids, (channels, 2 * height, 2 * width), seed=0)
    return flow.decode(z, low)


def train(flow: Flow, pictures: Tensor, *, steps: int, batch: int = 32) -> list[float]:
    """Maximise log p(x | y) of random crops; the loss in bits per dimension of each step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    losses = []
    for _ in range(steps):
        x = crops(pictures, batch, SIZE, generator)
        x = x + (torch.rand(x.shape, generator=generator) - 0.5) * (2 / 255)  # grey values are cells, not points
        bits = -flow.log_prob(x, F.avg_pool2d(x, 2)).mean() / (x[0].numel() * np.log(2)) + np.log2(127.5)
        optimizer.zero_grad()
        bits.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(bits.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path("super_resolution.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    training, test = photographs()
    flow = build()
    losses = train(flow, training, steps=options.steps)
    flow.eval()
    generator = torch.Generator().manual_seed(5)
    unseen = crops(test, 64, SIZE, generator)
    truth = crops(test, 32, SHOWN, generator)
    truth = truth[truth.std((1, 2, 3)).argsort(descending=True)[:6]]  # not the sky
    low = F.avg_pool2d(truth, 2)
    with torch.no_grad():
        bits = -flow.log_prob(unseen, F.avg_pool2d(unseen, 2)).mean() / (unseen[0].numel() * np.log(2)) + np.log2(127.5)
        draws = [enlarge(flow, low, temperature=0.8, ids=torch.arange(6) + 6 * k) for k in range(2)]
        likely = enlarge(flow, low, temperature=0.0, ids=torch.arange(6))
    smooth = F.interpolate(low, scale_factor=2.0, mode="bicubic", align_corners=False)
    print(f"bits per dimension: {losses[-1]:.2f} training, {float(bits):.2f} on the unseen side of the photographs")
    for name, picture in (("bicubic", smooth), ("flow, temperature 0", likely), ("flow, temperature 0.8", draws[0])):
        error = F.mse_loss(picture, truth)
        kept = (F.avg_pool2d(picture, 2) - low).abs().mean() * 127.5
        print(f"{name:22} PSNR {float(10 * torch.log10(4 / error)):5.2f} dB, averages off by {float(kept):.1f} of 255")
    rows = [F.interpolate(low, scale_factor=2.0, mode="nearest"), smooth, likely, *draws, truth]
    options.out.write_bytes(sheet_png(torch.cat(rows).clamp(-1, 1), columns=6))
    print(f"{options.out}: low resolution, bicubic, temperature 0, two draws at 0.8, truth")


if __name__ == "__main__":
    main()

"""A VAE whose posterior and prior are flows.

The Gaussian posterior of a VAE cannot bend, and its Gaussian prior leaves holes that no picture comes from. An inverse
autoregressive flow bends the one (Kingma et al. 2016, arXiv:1606.04934): its draws take a single pass, and the density
of a draw comes with it. A masked autoregressive flow fills the other (Chen et al. 2017, arXiv:1611.02731). Four models
of the same size learn the handwritten digits, and the bound on their likelihood is measured on unseen ones.

    python examples/vae_flows.py
"""

from __future__ import annotations

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pygen.flows import Flow, Inverse, MaskedAutoregressive, Permutation, Stack, StandardNormal, Transform
from pygen.nn.made import MADE
from pygen.ops import MaskedAffine
from pygen.vae import VAE, VAEConfig

LATENT = 8


def masked(layers: int, *, context: int = 0) -> list[Transform]:
    """Masked autoregressive layers with the order of the dimensions reversed between them."""
    steps: list[Transform] = []
    for k in range(layers):
        steps += [Permutation.reverse(LATENT)] if k else []
        made = MADE(LATENT, width=64, blocks=1, per_input=2, context=context)
        steps.append(MaskedAutoregressive(made, MaskedAffine(activation="tanh", limit=2.0)))
    return steps


def build(*, posterior: bool, prior: bool) -> VAE:
    """A VAE of the digits with a Gaussian or a flow in either place."""
    return VAE(
        VAEConfig(shape=(1, 8, 8), levels=17, classes=10, latent=LATENT, width=16),
        # The direction of the single pass is the one that draws.
        posterior_flow=Inverse(Stack(masked(2, context=2 * LATENT))) if posterior else None,
        prior=Flow(masked(2), StandardNormal(LATENT)) if prior else None,
    )


def train(model: VAE, x: Tensor, labels: Tensor, *, steps: int, batch: int = 64) -> None:
    """Maximise the evidence lower bound."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        loss = model.loss(x[rows], condition=labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    training, unseen = order[:1400], order[1400:]
    print("bound on unseen digits, in bits per grey value (less is better):")
    for posterior in (False, True):
        for prior in (False, True):
            torch.manual_seed(0)
            model = build(posterior=posterior, prior=prior)
            train(model, x[training], labels[training], steps=options.steps)
            model.eval()
            with torch.no_grad():
                bound = model.log_prob(x[unseen], condition=labels[unseen], importance_samples=16).mean()
            name = f"{'flow' if posterior else 'Gaussian'} posterior, {'flow' if prior else 'Gaussian'} prior"
            print(f"  {name:36} {float(-bound) / (64 * math.log(2)):.3f}")


if __name__ == "__main__":
    main()

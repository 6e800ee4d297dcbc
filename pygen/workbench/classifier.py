"""A small convolutional classifier of the real pictures; samples are judged in the space of its penultimate layer.

Its features are few (32 at most), so that a few hundred test pictures carry a covariance. Data without labels get the
labels of a pretext: by how many quarter turns a picture was rotated (Gidaris et al. 2018, arXiv:1803.07728).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_FEATURES = 32


class Classifier(nn.Module):
    """Pictures (n, channels, height, width) in [-1, 1] to logits (n, classes), through `features` (n, num_features)."""

    def __init__(self, shape: tuple[int, int, int], classes: int, *, num_features: int = MAX_FEATURES) -> None:
        super().__init__()
        if not 1 <= num_features <= MAX_FEATURES:
            raise ValueError(f"num_features is {num_features}, but expected 1 .. {MAX_FEATURES}")
        self.classes = classes
        self.num_features = num_features
        channels, height, width = shape
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.SiLU()]
        inner = 32
        while True:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
            layers += [nn.Conv2d(inner, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU()]
            inner = 64
            if height <= 4 and width <= 4:
                break
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * height * width, num_features), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(num_features, classes))

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer, (n, num_features)."""
        features: Tensor = self.trunk(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits

    @torch.no_grad()
    def read(self, x: Tensor, *, chunk: int = 512) -> tuple[Tensor, Tensor]:
        """Features (n, num_features) and most likely classes (n,) of pictures, in evaluation mode."""
        self.eval()
        features = torch.cat([self.features(rows) for rows in torch.split(x, chunk)])
        predicted: Tensor = self.head(features).argmax(1)
        return features, predicted


def train_classifier(
    pictures: Tensor, labels: Tensor | None, classes: int | None, *, seed: int = 0, steps: int = 600, batch: int = 64
) -> Classifier:
    """A classifier trained on pictures (n, channels, height, width) in [-1, 1] with labels int64 (n,).

    Without labels it learns to tell the quarter turns of a picture (half turns, if pictures are not square). The same
    seed gives the same classifier; PyTorch's global generator is left as it was.

    Raises ValueError for labels that do not fit the pictures.
    """
    if labels is None or classes is None:
        pictures, labels, classes = _turned(pictures)
    if labels.shape != (len(pictures),):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but expected ({len(pictures)},)")
    _, channels, height, width = pictures.shape
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier((channels, height, width), classes)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(pictures), (batch,), generator=generator)
            # A little noise keeps the features of trained and held-out pictures alike.
            x = pictures[rows] + 0.1 * torch.randn(pictures[rows].shape, generator=generator)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(F.cross_entropy(classifier(x), labels[rows]))
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def accuracy(classifier: Classifier, pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures (n, channels, height, width) that the classifier labels as `labels` (n,) says."""
    return float((classifier.read(pictures)[1] == labels).double().mean())


def _turned(pictures: Tensor) -> tuple[Tensor, Tensor, int]:
    turns = range(4) if pictures.shape[-1] == pictures.shape[-2] else range(0, 4, 2)
    turned = torch.cat([torch.rot90(pictures, turn, dims=(-2, -1)) for turn in turns])
    return turned, torch.arange(len(turns)).repeat_interleave(len(pictures)), len(turns)

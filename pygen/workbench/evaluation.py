"""What one model is worth: bits per dimension of held-out pictures, quality of its samples, and what they cost.

Bits per dimension are -log p(x) / (D ln 2), mean over the test pictures, D values in each.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pygen.model import Density, GenerativeModel
from pygen.workbench.classifier import Classifier, accuracy, train_classifier
from pygen.workbench.data import Dataset
from pygen.workbench.metrics import class_coverage, frechet_distance, manifold_scores

CHUNK = 500
# Logits over the levels of one chunk, for the families that make them all at once: 128 MiB in float32.
CHUNK_LOGITS = 1 << 25
SPREAD = 100.0
# The third nearest neighbour of a picture needs three others, and a fifth of 18 pictures is these four.
HELD_OUT, FEWEST = 4, 18


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near a set of pictures comes to the test split, on the features of the judge's classifier."""

    frechet: float
    """Frechet distance; 100 is the total variance of real features."""
    precision: float
    """Share of the pictures that look real."""
    recall: float
    """Share of the test pictures that these pictures come near."""
    coverage: float | None
    """Share of the classes shown with at least half of their real frequency; None for data without labels."""
    agreement: float | None
    """Share of the pictures that the classifier reads as the class they were made for."""


@dataclasses.dataclass(frozen=True)
class Evaluation(Quality):
    """A model's quality, density and costs, as they stand in summary.json."""

    density: str
    """What the model can say of p(x): "implicit", "lower bound" or "exact"."""
    bits_per_dim: float | None
    """Mean over the test split; None without a density."""
    bits_kind: str | None
    """"exact" for the cost of the discrete pictures themselves, "bound" for an upper bound on it."""
    bits_error: float | None
    """Standard error of that mean over the test pictures."""
    sample_seconds: float
    """Seconds for 100 samples in one batch."""
    network_passes: int
    """Network passes for those samples."""
    parameters: int
    """Numbers that training chose."""


class Judge:
    """A classifier of the training split, and the features of the test split to hold pictures against.

    Every set that is judged has as many pictures as the training split (`limit` at most), with its labels, so that the
    training split itself is a row to hold them against: sizes and class frequencies are the same, and only the pictures
    differ. `say` is told when the classifier's training begins.

    Raises ValueError for data with too few pictures to measure anything.
    """

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        *,
        seed: int = 0,
        limit: int = 2000,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        if min(len(train), len(test)) < HELD_OUT:
            raise ValueError(
                f"{test.name} has {len(train) + len(test)} pictures, {len(test)} of them held out, but at least "
                f"{FEWEST} are needed, {HELD_OUT} of them held out"
            )
        say(f"{train.name}: {len(train)} pictures to train on, {len(test)} held out; training the judge")
        self.data = train
        self.levels = train.levels
        chosen = spread(len(train), limit)
        self.real = train.values(chosen)
        self.labels = None if train.labels is None else train.labels[chosen]
        self.test = test.values()
        self.test_labels = test.labels
        self.classifier: Classifier = train_classifier(train.values(), train.labels, train.classes, seed=seed)
        features, _ = self.classifier.read(self.test)
        total = float(features.double().var(0).sum())
        if total == 0:
            raise ValueError(f"the held-out pictures of {test.name} are all alike, but expected some that differ")
        self.scale = math.sqrt(SPREAD / total)
        self.test_features = features.double() * self.scale
        self.accuracy = None if test.labels is None else accuracy(self.classifier, self.test, test.labels)

    @property
    def count(self) -> int:
        """How many pictures a set to be judged should have."""
        return len(self.real)

    def noise(self, *, seed: int = 0) -> Tensor:
        """As many pictures of independent, uniform grey values: what a model that learnt nothing draws."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(self.levels, self.real.shape, generator=generator)
        return values.float() * (2 / (self.levels - 1)) - 1

    def score(self, pictures: Tensor, labels: Tensor | None = None) -> Quality:
        """The quality of pictures (n, channels, height, width) in [-1, 1], made for `labels` (n,) if given."""
        features, predicted = self.classifier.read(pictures)
        features = features.double() * self.scale
        manifold = manifold_scores(self.test_features, features)
        return Quality(
            frechet=frechet_distance(self.test_features, features),
            precision=manifold.precision,
            recall=manifold.recall,
            # The classes of a pretext are none of the data's: covering them would say nothing.
            coverage=None
            if self.test_labels is None
            else class_coverage(self.test_labels, predicted, self.classifier.classes),
            agreement=None if labels is None else float((predicted == labels).double().mean()),
        )


def check_fit(model: GenerativeModel, data: Dataset, class_names: Sequence[str] = ()) -> None:
    """ValueError, in one sentence, where the model was built for other pictures or other classes than the data's.

    class_names: what the labels stood for in training, where that is known; a model without classes takes any.
    """
    config = model.config
    if (config.shape, config.levels) != (data.shape, data.levels):
        raise ValueError(
            f"the model makes pictures of shape {config.shape} with {config.levels} grey values, "
            f"but {data.name} has shape {data.shape} with {data.levels}"
        )
    if config.classes is None:
        return
    if config.classes != data.classes:
        raise ValueError(
            f"the model was trained with {config.classes} classes, but {data.name} has {data.classes or 'none'}"
        )
    if class_names and tuple(class_names) != tuple(data.class_names):
        label = next(
            i for i, (ours, theirs) in enumerate(zip(class_names, data.class_names, strict=False)) if ours != theirs
        )
        raise ValueError(
            f"the model was trained with class {label} as {class_names[label]!r}, but in {data.name} that is "
            f"{data.class_names[label]!r}"
        )


def spread(n: int, count: int) -> Tensor:
    """At most `count` of the numbers 0 .. n-1, evenly spaced, so that sorted data keep their proportions."""
    return torch.arange(n) if n <= count else torch.arange(count) * n // count


def chunk_size(model: GenerativeModel) -> int:
    """How many pictures of a model are handled at once, so that memory does not grow with shape and levels."""
    config = model.config
    return max(1, min(CHUNK, CHUNK_LOGITS // (config.dimensions * config.levels)))


@torch.no_grad()
def draw(
    model: GenerativeModel, ids: Tensor, labels: Tensor | None = None, *, seed: int = 0, steps: int | None = None
) -> Tensor:
    """The samples numbered `ids` (n,), on the CPU, rounded to the grey values that real pictures have; labels (n,)."""
    model.eval()
    conditional = labels is not None and model.config.classes is not None
    rows = []
    for chunk in torch.split(torch.arange(len(ids)), chunk_size(model)):
        condition = labels[chunk].to(model.device) if labels is not None and conditional else None
        x = model.sample(len(chunk), ids=ids[chunk].to(model.device), condition=condition, seed=seed, steps=steps)
        rows.append(model.dequantize(model.quantize(x)).cpu())
    return torch.cat(rows)


@torch.no_grad()
def bits_per_dim(
    model: GenerativeModel, pictures: Tensor, labels: Tensor | None = None, *, seed: int = 0
) -> tuple[float, float] | None:
    """Mean and standard error, over pictures (n, channels, height, width), of the bits that one value costs.

    None for a model that has no density.
    """
    if model.density is Density.IMPLICIT:
        return None
    model.eval()
    device = model.device
    nats = []
    for ids in torch.split(torch.arange(len(pictures)), chunk_size(model)):
        condition = labels[ids].to(device) if labels is not None and model.config.classes is not None else None
        x = pictures[ids].to(device)
        nats.append(model.log_prob(x, condition=condition, ids=ids.to(device), seed=seed).double().cpu())
    bits = -torch.cat(nats) / (model.config.dimensions * math.log(2))
    return float(bits.mean()), float(bits.std() / math.sqrt(len(bits)))


def bits_kind(model: GenerativeModel) -> str:
    """What the bits of a model with a density are: "exact", or "bound", which the true cost of a picture is at most."""
    return "exact" if model.density is Density.EXACT and model.discrete else "bound"


@torch.no_grad()
def seconds_per_100(model: GenerativeModel, *, seed: int = 0, steps: int | None = None, calls: int = 4) -> float:
    """Wall-clock seconds for 100 samples in one batch: the median of the calls after the first, or of a single one.

    A call that takes more than three seconds is the last.
    """
    model.eval()
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        model.sample(100, seed=seed, steps=steps)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        taken.append(time.perf_counter() - start)
        if taken[-1] > 3:
            break
    return statistics.median(taken[1:] or taken)


def evaluate(
    model: GenerativeModel, judge: Judge, *, seed: int = 0, steps: int | None = None
) -> tuple[Evaluation, Tensor]:
    """The evaluation of a model, and the samples (n, channels, height, width) that it rests on, on the CPU.

    Raises ValueError when the model was built for other pictures or classes than the judge's.
    """
    check_fit(model, judge.data)
    samples = draw(model, torch.arange(judge.count), judge.labels, seed=seed, steps=steps)
    bits = bits_per_dim(model, judge.test, judge.test_labels, seed=seed)
    quality = judge.score(samples, judge.labels if model.config.classes is not None else None)
    evaluation = Evaluation(
        **dataclasses.asdict(quality),
        density=model.density.value,
        bits_per_dim=None if bits is None else bits[0],
        bits_kind=None if bits is None else bits_kind(model),
        bits_error=None if bits is None else bits[1],
        sample_seconds=seconds_per_100(model, seed=seed, steps=steps),
        network_passes=model.network_passes(steps),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    return evaluation, samples


def quality_with_steps(model: GenerativeModel, judge: Judge, steps: int, *, seed: int = 0) -> dict[str, float]:
    """The quality of a model's samples with this number of steps, and their cost, as plain numbers."""
    samples = draw(model, torch.arange(judge.count), judge.labels, seed=seed, steps=steps)
    quality = judge.score(samples)
    return {
        "steps": steps,
        "network_passes": model.network_passes(steps),
        "frechet": quality.frechet,
        "precision": quality.precision,
        "recall": quality.recall,
        # The drawing before was the warm-up.
        "sample_seconds": seconds_per_100(model, seed=seed, steps=steps, calls=1),
    }

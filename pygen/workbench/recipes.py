"""How each family is trained in the comparison: one table, and the way from a recipe to a trained model.

The numbers of steps are such that on two cores all families take about the same time on the digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pygen.model import GenerativeModel
from pygen.workbench import families
from pygen.workbench.data import Dataset
from pygen.workbench.training import TrainingConfig, TrainingResult, train

BUDGETS: dict[str, int] = {"quick": 1, "full": 5}
"""By what the steps of a recipe are multiplied."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings for the quick budget, and what the model's configuration changes from its defaults."""

    training: TrainingConfig
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "gan": Recipe(
        training=TrainingConfig(steps=1100, batch_size=64, learning_rate=1e-3, betas=(0.0, 0.95), warmup=50),
        model={"width": 16},
    ),
    "vae": Recipe(training=TrainingConfig(steps=1200, batch_size=64, learning_rate=2e-3, warmup=100)),
    "flow": Recipe(
        training=TrainingConfig(
            steps=900, batch_size=128, learning_rate=2e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup=50
        )
    ),
    "diffusion": Recipe(training=TrainingConfig(steps=1200, batch_size=64, learning_rate=2e-3, warmup=100)),
    "autoregressive": Recipe(
        training=TrainingConfig(steps=900, batch_size=64, learning_rate=3e-3, betas=(0.9, 0.999), warmup=50)
    ),
}


def training_for(family: str, *, budget: str = "quick", seed: int = 0) -> TrainingConfig:
    """The training settings of a family's recipe; ValueError for an unknown family or budget."""
    if family not in RECIPES:
        raise ValueError(f"{family!r} is no family{families.suggestion(family, RECIPES)}")
    if budget not in BUDGETS:
        raise ValueError(f"{budget!r} is no budget{families.suggestion(budget, BUDGETS)}")
    training = RECIPES[family].training
    return dataclasses.replace(training, steps=training.steps * BUDGETS[budget], seed=seed, checkpoint_every=0)


def build_family(
    family: str, dataset: Dataset, *, seed: int, model: Mapping[str, Any] | None = None
) -> GenerativeModel:
    """A new model of the family for the pictures of a dataset, its weights drawn by `seed`.

    model: what its configuration changes from the defaults; by default what the recipe says.

    Raises ValueError where the family does not take pictures of that shape, or the configuration refuses a value.
    """
    changed = RECIPES[family].model if model is None else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return families.build(family, shape=dataset.shape, levels=dataset.levels, classes=dataset.classes, **changed)


def train_family(
    family: str,
    dataset: Dataset,
    *,
    training: TrainingConfig,
    model: Mapping[str, Any] | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
    tensorboard: bool = False,
) -> TrainingResult:
    """Build a model of the family for the pictures of a dataset, its weights drawn by `training.seed`, and train it.

    model: as for `build_family`. The other arguments, and what is raised, are those of `training.train`.
    """
    built = build_family(family, dataset, seed=training.seed, model=model).to(device)
    return train(
        built,
        dataset,
        training,
        out=out,
        resume=resume,
        device=device,
        progress=progress,
        label=family,
        tensorboard=tensorboard,
    )

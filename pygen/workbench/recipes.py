"""The way from the name of a recipe to a trained model, as the comparison and the command line go it."""

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


def training_for(family: str, recipe: str | None = None, *, budget: str = "quick", seed: int = 0) -> TrainingConfig:
    """The training settings of a recipe; ValueError for an unknown family, recipe or budget."""
    training = families.find(family, recipe).training
    if budget not in BUDGETS:
        raise ValueError(f"{budget!r} is no budget{families.suggestion(budget, BUDGETS)}")
    return dataclasses.replace(training, steps=training.steps * BUDGETS[budget], seed=seed, checkpoint_every=0)


def build_family(
    family: str, dataset: Dataset, *, recipe: str | None = None, seed: int, model: Mapping[str, Any] | None = None
) -> GenerativeModel:
    """A new model of the family for the pictures of a dataset, its weights drawn by `seed`.

    recipe: by default the family's first.
    model: what its configuration changes from the defaults; by default what the recipe says.

    Raises ValueError where the recipe does not take pictures of that shape, or the configuration refuses a value.
    """
    changes = families.find(family, recipe).changes if model is None else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return families.build(
            family, recipe, shape=dataset.shape, levels=dataset.levels, classes=dataset.classes, **changes
        )


def train_family(
    family: str,
    dataset: Dataset,
    *,
    recipe: str | None = None,
    training: TrainingConfig,
    model: Mapping[str, Any] | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
    tensorboard: bool = False,
) -> TrainingResult:
    """Build a model of the family for the pictures of a dataset, its weights drawn by `training.seed`, and train it.

    recipe, model: as for `build_family`. The other arguments, and what is raised, are those of `training.train`.
    """
    built = build_family(family, dataset, recipe=recipe, seed=training.seed, model=model).to(device)
    return train(
        built,
        dataset,
        training,
        out=out,
        resume=resume,
        device=device,
        progress=progress,
        label=families.label(family, recipe),
        tensorboard=tensorboard,
    )

"""Training: one loop for all families and any number of players."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pygen.model import GenerativeModel
from pygen.workbench import require
from pygen.workbench.checkpoint import (
    CheckpointError,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    prepare_folder,
    remove_unfinished,
)
from pygen.workbench.data import Dataset
from pygen.workbench.families import label as label_of
from pygen.workbench.families import recipe_of
from pygen.workbench.progress import Progress
from pygen.workbench.run import Run, TrainingDiverged
from pygen.workbench.settings import TrainingConfig

__all__ = ["Progress", "TrainingConfig", "TrainingDiverged", "TrainingResult", "train"]


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A trained model.

    model, ema: the last weights and their moving average, both in evaluation mode.
    step: training steps done.
    seconds: time they took, over all the processes of a resumed run.
    history: one record every `log_every` steps: step, seconds, learning_rate, and by player the means of losses and
        gradient_norms since the last record.
    checkpoint: folder of the last checkpoint, or None without `out`.
    """

    model: GenerativeModel
    ema: GenerativeModel
    step: int
    seconds: float
    history: list[dict[str, Any]]
    checkpoint: Path | None


def train(
    model: GenerativeModel,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool | Callable[[Progress], None] = True,
    label: str | None = None,
    tensorboard: bool = False,
) -> TrainingResult:
    """Train `model`, in place, on the pictures of `dataset`.

    In each step every player of `model.players()`, in order, descends on its loss for the same batch; only its own
    parameters get gradients then. Batches run through the data in an order that depends on the seed and the epoch
    alone, and a batch may span two epochs. The same seed gives the same weights on the same machine, and a run that was
    killed and resumed the same as one that was not; on CUDA as far as the model's kernels repeat (cuDNN is told to).
    PyTorch's generators are seeded with `config.seed` for the noise in the losses and put back afterwards; NumPy's and
    Python's are neither used nor touched. The weights that `model` comes with are the caller's to seed.

    out: the run's folder, for checkpoints; without it nothing is written.
    resume: go on from the latest checkpoint in `out`, if it has one. Without it, a folder that has one is refused.
    device: where to train; where the model is by default.
    progress: a line on stderr, or a function to call with each Progress.
    label: what the progress line starts with; the family and the recipe by default.
    tensorboard: also write the history to `out`/tensorboard; needs the package tensorboard.

    Raises ValueError before training where data, model and configuration do not fit, CheckpointError where `out` cannot
    be written or a checkpoint is damaged or of another run, and TrainingDiverged, without touching the last checkpoint,
    for a loss that is not finite.
    """
    folder = None if out is None else Path(out)
    _check_fit(model, dataset)
    if folder is not None:
        require("safetensors.torch", "checkpoints")
        if has_checkpoint(folder) and not resume:
            raise CheckpointError(
                f"{folder} holds the checkpoints of an earlier run ({find_checkpoint(folder).name}): resume it, or "
                "choose another folder"
            )
    elif resume or tensorboard:
        raise ValueError(f"out is None, but {'resume' if resume else 'tensorboard'} needs the run's folder")
    run = Run(model, dataset, config, torch.device(device) if device is not None else model.device)
    if folder is not None:
        # A disk that refuses is found now, not by the first checkpoint after the work.
        prepare_folder(folder)
    with run.generators(), _recorder(folder, tensorboard) as record:
        if folder is not None and has_checkpoint(folder):
            remove_unfinished(folder)
            run.restore(load_checkpoint(folder), folder)
        run.go(folder, progress, _label(model) if label is None else label, record)
    return TrainingResult(
        model.eval(), run.average, run.step, run.seconds, run.history, find_checkpoint(folder) if folder else None
    )


def _label(model: GenerativeModel) -> str:
    known = recipe_of(model)
    return type(model).__name__ if known is None else label_of(*known)


def _check_fit(model: GenerativeModel, dataset: Dataset) -> None:
    config, name = model.config, type(model).__name__
    if dataset.shape != config.shape:
        raise ValueError(
            f"the pictures of {dataset.name} have shape {dataset.shape}, but {name} expects {config.shape}"
        )
    if dataset.levels != config.levels:
        raise ValueError(f"{dataset.name} has {dataset.levels} levels, but {name} expects {config.levels}")
    if config.classes is not None and dataset.classes != config.classes:
        raise ValueError(f"{dataset.name} has {dataset.classes or 'no'} classes, but {name} expects {config.classes}")


@contextlib.contextmanager
def _recorder(folder: Path | None, tensorboard: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows a record in TensorBoard, or does nothing."""
    if folder is None or not tensorboard:
        yield lambda record: None
        return
    require("tensorboard", "tensorboard=True", install="tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def write(record: dict[str, Any]) -> None:
            for kind in ("losses", "gradient_norms"):
                for player, value in record[kind].items():
                    writer.add_scalar(f"{kind}/{player}", value, record["step"])
            writer.add_scalar("learning_rate", record["learning_rate"], record["step"])

        yield write

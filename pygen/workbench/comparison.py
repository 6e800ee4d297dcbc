"""The main job: train the families on the same pictures, each for its number of steps, and hold them together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pygen
from pygen.model import Density, GenerativeModel, Stage
from pygen.workbench import figures, report, require
from pygen.workbench.checkpoint import prepare_folder
from pygen.workbench.data import Dataset
from pygen.workbench.evaluation import Judge, evaluate, quality_with_steps
from pygen.workbench.families import find, resolve
from pygen.workbench.information import library_versions, processor_name
from pygen.workbench.recipes import build_family, train_family, training_for
from pygen.workbench.training import TrainingConfig

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS_SHOWN = 8
WAYS_SHOWN = 3


def compare(
    *,
    data: Dataset,
    out: Path,
    families: Sequence[str],
    recipes: Mapping[str, str] | None = None,
    budget: str = "quick",
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train and judge the families; the summary that is also written to `out`/summary.json.

    recipes: by family, which of its recipes; by default the first.

    Writes report.html, summary.json, samples_<family>.png, crossing.png, passes.svg and a folder of checkpoints for
    each family, and prints the table and the path of the report. The split of the data is the same for every seed.

    Raises ValueError for an unknown recipe or budget, no families, data that cannot be split or pictures that a family
    refuses, CheckpointError for a folder that cannot be written, and MissingDependency, all before any training.
    """
    if not families:
        raise ValueError("families is empty, but expected at least one name")
    chosen = {family: resolve(family, (recipes or {}).get(family)) for family in families}
    training = {family: training_for(family, chosen[family], budget=budget, seed=seed) for family in families}
    start = time.perf_counter()
    train, test = data.split()
    for family in families:
        try:
            build_family(family, train, recipe=chosen[family], seed=seed)
        except ValueError as error:
            raise ValueError(f"the family {family} does not take the pictures of {data.name}: {error}") from error
    for module in ("matplotlib.figure", "PIL.Image", "torchmetrics.image.fid"):
        require(module, "a comparison")
    prepare_folder(out)
    with _threads(math.prod(train.shape)):
        return _compare(train, test, out, chosen, training, start, budget, seed, device, progress)


def _compare(
    train: Dataset,
    test: Dataset,
    out: Path,
    recipes: Mapping[str, str],
    training: Mapping[str, TrainingConfig],
    start: float,
    budget: str,
    seed: int,
    device: torch.device | str,
    progress: bool,
) -> dict[str, Any]:
    families = list(recipes)
    say = print if progress else _silent
    judge = Judge(train, test, seed=seed, say=functools.partial(say, flush=True))
    real, noise = judge.score(judge.real, judge.labels), judge.score(judge.noise(seed=seed))
    if judge.accuracy is not None:
        say(f"the judge reads {judge.accuracy:.1%} of the held-out pictures correctly", flush=True)

    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, GenerativeModel] = {}
    samples: dict[str, Tensor] = {}
    for number, family in enumerate(families, 1):
        title = f"[{number}/{len(families)}] {figures.name_of(family, recipes[family])}"
        say(f"\n{title}: training", flush=True)
        folder = out / "checkpoints" / family
        shutil.rmtree(folder, ignore_errors=True)
        trained = train_family(
            family,
            train,
            recipe=recipes[family],
            training=training[family],
            out=folder,
            device=device,
            progress=progress,
        )
        passes = trained.ema.network_passes()
        each = f"{passes} network pass{'' if passes == 1 else 'es'} each"
        say(f"{title}: judging {judge.count} samples, {each}", flush=True)
        result, samples[family] = evaluate(trained.ema, judge, seed=seed)
        rows[family] = {
            "recipe": recipes[family],
            **dataclasses.asdict(result),
            "train_seconds": trained.seconds,
        }
        models[family] = trained.ema

    curve: list[dict[str, float]] = []
    if "diffusion" in models:
        say("\nDiffusion: from 1 step to many", flush=True)
        curve = _curve(models["diffusion"], rows["diffusion"], judge, seed=seed, say=say)
    summary: dict[str, Any] = {
        "families": rows,
        "real": _yardstick(dataclasses.asdict(real), None, None),
        "noise": _yardstick(dataclasses.asdict(noise), Density.EXACT.value, math.log2(train.levels)),
        "machine": machine(device),
        "seed": seed,
        "budget": budget,
        "data": {
            "name": train.name,
            "shape": list(train.shape),
            "levels": train.levels,
            "classes": train.classes,
            "dimensions": math.prod(train.shape),
            "train": len(train),
            "test": len(test),
            "judged": judge.count,
        },
        "classifier": {
            "accuracy": judge.accuracy,
            "features": judge.classifier.num_features,
            "classes": judge.classifier.classes,
        },
        "steps_curve": curve,
        "recipes": {family: _shown(training[family], find(family, name).changes) for family, name in recipes.items()},
        "versions": {
            "pygen": pygen.__version__,
            "python": sys.version.split()[0],
            **library_versions("torch", "numpy", "torchmetrics", "sklearn", "matplotlib"),
        },
    }
    return _write(summary, out, judge, models, samples, test, start=start, seed=seed, say=say)


@contextlib.contextmanager
def _threads(dimensions: int) -> Iterator[None]:
    """One thread of PyTorch for small pictures, and the number there was after it.

    Networks this small lose more to waking a second thread than they gain by it, and on one thread the numbers do not
    depend on how many cores there are.
    """
    before = torch.get_num_threads()
    if dimensions < report.SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device | str) -> dict[str, Any]:
    """Processor, threads and device that the times belong to."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "system": f"{os.uname().sysname} {os.uname().machine}",
    }


def _shown(training: TrainingConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("steps", "batch_size", "learning_rate", "betas", "weight_decay", "schedule", "ema_images")
    return {**{key: getattr(training, key) for key in keys}, "model": ", ".join(f"{k}={v}" for k, v in changes.items())}


def _yardstick(quality: Mapping[str, Any], density: str | None, bits: float | None) -> dict[str, Any]:
    costs = ("bits_error", "sample_seconds", "network_passes", "train_seconds", "parameters")
    kind = None if bits is None else "exact"
    return {**quality, "density": density, "bits_per_dim": bits, "bits_kind": kind, **dict.fromkeys(costs)}


def _curve(
    model: GenerativeModel, row: Mapping[str, Any], judge: Judge, *, seed: int, say: Any
) -> list[dict[str, float]]:
    """Quality against the number of steps, from one trained model; its own number of steps is in `row` already."""
    curve = []
    for steps in (each for each in STEPS if each <= getattr(model.config, "timesteps", STEPS[-1])):
        if steps == row["network_passes"]:
            keys = ("network_passes", "frechet", "precision", "recall", "sample_seconds")
            point = {"steps": steps, **{key: row[key] for key in keys}}
        else:
            point = quality_with_steps(model, judge, steps, seed=seed)
        curve.append(point)
        say(f"  {steps:>4} steps: Frechet distance {point['frechet']:.2f}", flush=True)
    return curve


def _write(
    summary: dict[str, Any],
    out: Path,
    judge: Judge,
    models: Mapping[str, GenerativeModel],
    samples: Mapping[str, Tensor],
    test: Dataset,
    *,
    start: float,
    seed: int,
    say: Any,
) -> dict[str, Any]:
    rows = summary["families"]
    ink = figures.is_ink(judge.real)
    shown, columns = in_columns(test.labels, test.classes, len(test))
    shown_real = judge.test[shown]
    for family in figures.TITLES.keys() - samples.keys():
        # Of an earlier comparison in this folder, beside whose report it would look like part of this one.
        (out / f"samples_{family}.png").unlink(missing_ok=True)
    sheets = {"real": figures.sheet_png(shown_real, columns, ink=ink)}
    for family, pictures in samples.items():
        drawn = pictures[in_columns(judge.labels, test.classes, judge.count)[0]]
        sheets[family] = figures.sheet_png(drawn, columns, ink=ink)
        beside = figures.samples_beside_real(
            drawn, shown_real, figures.name_of(family, rows[family]["recipe"]), columns=columns, ink=ink
        )
        (out / f"samples_{family}.png").write_bytes(beside)

    ways = {family: _way(model, seed=seed) for family, model in models.items()}
    crossing = figures.crossing(ways, ink=ink)
    points = {family: (row["network_passes"], row["sample_seconds"], row["frechet"]) for family, row in rows.items()}
    passes = figures.quality_against_passes(
        summary["steps_curve"], points, real=summary["real"]["frechet"], noise=summary["noise"]["frechet"]
    )
    (out / "crossing.png").write_bytes(crossing)
    (out / "passes.svg").write_bytes(passes)

    summary["seconds"] = time.perf_counter() - start
    (out / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    page = out / "report.html"
    page.write_text(report.render(summary, sheets, crossing, passes), encoding="utf-8")
    say("\n" + report.terminal_table({"real": summary["real"], **rows, "noise": summary["noise"]}))
    say(f"\n{page}", flush=True)
    return summary


def in_columns(labels: Tensor | None, classes: int | None, n: int) -> tuple[Tensor, int]:
    """Which of n pictures to show, row by row, and in how many columns: the first of each class under each other."""
    if labels is not None and classes is not None and 2 <= classes <= 12:
        rows = min(ROWS_SHOWN, int(torch.bincount(labels, minlength=classes).min()))
        if rows > 0:
            of_class = [torch.nonzero(labels == label).flatten()[:rows] for label in range(classes)]
            return torch.stack(of_class, dim=1).flatten(), classes
    return torch.arange(min(n, ROWS_SHOWN**2)), ROWS_SHOWN


def _way(model: GenerativeModel, *, seed: int) -> list[Stage]:
    with torch.no_grad():
        return model.eval().trajectory(WAYS_SHOWN, ids=torch.arange(WAYS_SHOWN), seed=seed)


def _silent(*_: Any, **__: Any) -> None:
    return None

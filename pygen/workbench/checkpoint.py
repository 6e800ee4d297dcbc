"""Checkpoints: weights, optimizers, generators and counters on disk, without pickle, written so that no kill loses one.

A run's folder has one folder for each checkpoint it keeps, and a file `latest` with the name of the newest:

    runs/gan/latest
    runs/gan/step-00002000/model.safetensors    weights
                           ema.safetensors      their moving average
                           state.safetensors    optimizer moments, generator states
                           state.json           everything that is not a tensor, and the checksum of each file

A checkpoint is written under another name, flushed to the disk, renamed, and only then becomes the latest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pygen
from pygen.model import GenerativeModel
from pygen.workbench import families, require

FORMAT = 2
LATEST = "latest"
WEIGHTS, AVERAGE, STATE, FACTS = "model.safetensors", "ema.safetensors", "state.safetensors", "state.json"
_UNFINISHED = (".writing-", ".removing-")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model or run; the message names the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to go on as if it had never stopped.

    family, recipe: names in FAMILIES, or None for a model from elsewhere; model_class is its class by name.
    config: the model's `config_dict()`.
    step: training steps done.
    seconds: time spent training so far.
    training: the run's TrainingConfig as plain values.
    data: name, origin (see `data.reload_data`), fingerprint and class_names of the data.
    history: what the loop recorded.
    weights, average: tensors by their name in the model.
    optimizers: moments by "player/parameter/moment".
    generators: states of PyTorch's generators by device kind.
    versions: of pygen, PyTorch and Python, as a help when something differs.
    """

    family: str | None
    recipe: str | None
    model_class: str
    config: Mapping[str, Any]
    step: int
    seconds: float
    training: Mapping[str, Any]
    data: Mapping[str, Any]
    history: list[dict[str, Any]]
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizers: Mapping[str, Tensor]
    generators: Mapping[str, Tensor]
    versions: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "pygen": pygen.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )


_TENSORS = ("weights", "average", "optimizers", "generators")


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint into a run's folder, make it the latest, and remove all but the newest `keep`.

    Killed at any moment, the folder's latest checkpoint is either the one before or this one, and complete. Returns the
    checkpoint's own folder. Raises CheckpointError where the disk refuses.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but expected at least 1")
    name = _unused(folder, f"step-{checkpoint.step:08d}")
    writing = folder / f"{_UNFINISHED[0]}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        writing.mkdir()
        facts = {
            field.name: getattr(checkpoint, field.name)
            for field in dataclasses.fields(checkpoint)
            if field.name not in _TENSORS
        }
        state = {f"optimizers/{key}": value for key, value in checkpoint.optimizers.items()}
        state |= {f"generators/{key}": value for key, value in checkpoint.generators.items()}
        checksums = {
            file: _write_tensors(writing / file, tensors)
            for file, tensors in ((WEIGHTS, checkpoint.weights), (AVERAGE, checkpoint.average), (STATE, state))
        }
        text = json.dumps({"format": FORMAT, "checksums": checksums, **facts}, indent=1, allow_nan=False)
        _write_text(writing / FACTS, text)
        _flush(writing)
        final = folder / name
        writing.rename(final)
        _flush(folder)
        _write_text(folder / f"{_UNFINISHED[0]}{LATEST}", name)
        os.replace(folder / f"{_UNFINISHED[0]}{LATEST}", folder / LATEST)
        _flush(folder)
        for old in sorted(path for path in folder.glob("step-*") if path != final)[: -(keep - 1) or None]:
            old.rename(folder / f"{_UNFINISHED[1]}{old.name}")
        remove_unfinished(folder)
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be written: {error.strerror or error}") from error
    return final


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the latest in a run's folder.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if path.is_file() and path.name in (WEIGHTS, AVERAGE, STATE, FACTS):
        path = path.parent
    if (path / LATEST).is_file():
        name = _read_text(path / LATEST).strip()
        if not name or Path(name).name != name:
            raise CheckpointError(
                f"{path / LATEST} is damaged: it holds {name!r}, but expected a name like step-00001000"
            )
        if not (path / name).is_dir():
            raise CheckpointError(f"{path / name} is missing, but {path / LATEST} names it as the latest checkpoint")
        return path / name
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist, but expected a folder that training wrote")
    if not any((path / file).exists() for file in (FACTS, WEIGHTS, AVERAGE, STATE)):
        raise CheckpointError(f"{path} holds no checkpoint, but expected a folder that training wrote")
    return path


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder has a latest checkpoint, be it damaged or not."""
    return (folder / LATEST).exists()


def prepare_folder(folder: Path) -> None:
    """Make a run's folder, and write and remove a file in it; CheckpointError where the disk refuses either."""
    probe = folder / f"{_UNFINISHED[0]}probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror or error}), but expected a folder for what training keeps"
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill left half written or half removed in a run's folder."""
    for path in folder.iterdir():
        if path.name.startswith(_UNFINISHED):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the latest of a run's folder; all tensors on the CPU.

    Raises CheckpointError, naming the file, where one is missing, cut short, changed or of a newer format.
    """
    folder = find_checkpoint(path)
    facts = _read_facts(folder)
    state = _read_tensors(folder / STATE, facts)
    split: dict[str, dict[str, Tensor]] = {"optimizers": {}, "generators": {}}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind not in split:
            raise CheckpointError(f"{folder / STATE} holds {key!r}, but expected optimizers and generators")
        split[kind][name] = value
    return Checkpoint(
        **{field.name: facts[field.name] for field in dataclasses.fields(Checkpoint) if field.name not in _TENSORS},
        weights=_read_tensors(folder / WEIGHTS, facts),
        average=_read_tensors(folder / AVERAGE, facts),
        optimizers=split["optimizers"],
        generators=split["generators"],
    )


def load_model(path: str | Path, *, ema: bool = True, model: GenerativeModel | None = None) -> GenerativeModel:
    """A trained model, in evaluation mode: rebuilt from its recipe and configuration, or `model` with its weights.

    ema: take the moving average of the weights, which samples better, rather than the last weights.
    model: needed only for a model from outside FAMILIES.

    Raises CheckpointError for a damaged checkpoint, and for weights that do not fit the model.
    """
    folder = find_checkpoint(path)
    facts = _read_facts(folder)
    if model is None:
        if facts["family"] is None:
            raise CheckpointError(
                f"{folder} holds a {facts['model_class']}, which is none of the families: give a model to fill with it"
            )
        try:
            with torch.random.fork_rng(devices=[]):
                model = families.build(facts["family"], facts["recipe"], **facts["config"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / FACTS} has a configuration that this pygen refuses: {error}") from error
    file = folder / (AVERAGE if ema else WEIGHTS)
    fill(model, _read_tensors(file, facts), str(file))
    return model.eval().requires_grad_(False)


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by name; of tensors that are one and the same, the first."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if first.setdefault(id(value), name) == name}


@torch.no_grad()
def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy tensors into a model; CheckpointError, naming `origin`, unless names, shapes and dtypes are the model's."""
    wanted = model_tensors(model)
    for name in wanted.keys() ^ tensors.keys():
        has, lacks = (origin, "the model") if name in tensors else ("the model", origin)
        raise CheckpointError(f"{origin} does not fit {type(model).__name__}: {has} has {name}, but {lacks} does not")
    for name, value in tensors.items():
        target = wanted[name]
        if value.shape != target.shape or value.dtype != target.dtype:
            raise CheckpointError(
                f"{origin} does not fit {type(model).__name__}: {name} is {value.dtype} {tuple(value.shape)}, but "
                f"expected {target.dtype} {tuple(target.shape)}"
            )
    for name, value in tensors.items():
        wanted[name].copy_(value)


def _unused(folder: Path, name: str) -> str:
    # A checkpoint that is already there may be the latest: it stays until the new one has taken its place.
    names = (name if number == 0 else f"{name}.{number}" for number in itertools.count())
    return next(name for name in names if not (folder / name).exists())


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    try:
        facts = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not complete JSON ({error})") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise CheckpointError(f"{path} is damaged: it has no format number")
    if facts["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {facts['format']}, but this pygen reads {FORMAT}: use the other version"
        )
    needed = {field.name for field in dataclasses.fields(Checkpoint)} - set(_TENSORS) | {"checksums"}
    if missing := sorted(needed - facts.keys()):
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return facts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _read_tensors(path: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    safetensors = require("safetensors.torch", f"the checkpoint {path.parent}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        if _checksum(path) != facts["checksums"].get(path.name):
            raise CheckpointError(f"{path} is damaged: its checksum is not the one in {FACTS}")
        tensors: dict[str, Tensor] = safetensors.load_file(path)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors' own error class is not a public one in every version
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    safetensors = require("safetensors.torch", f"the checkpoint {path.parent}")
    # Clones, because safetensors refuses tensors that share memory.
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    # Not by its save_file, which makes files that only their owner may read.
    content = safetensors.save(whole)
    path.write_bytes(content)
    _flush(path)
    return zlib.crc32(content)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total = zlib.crc32(piece, total)
    return total


def _flush(path: Path) -> None:
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

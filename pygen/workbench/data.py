"""Data: pictures quantized to a few levels, with or without labels, and a split that is the same for every family.

The order of the pictures in an epoch is a pure function of (seed, epoch), so that a resumed run sees the same batches:
picture i comes at the rank of mix(mix(mix(seed) + epoch) + i), with the finalizer of SplitMix64 (Steele, Lea and Flood
2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pygen.workbench import sources
from pygen.workbench.sources import DataError, Source

__all__ = ["DataError", "Dataset", "is_picture_folder", "load_data", "permutation", "reload_data"]

BUILT_IN = ("digits", "photographs")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures with what is known of them.

    name: what a report calls them.
    pictures: uint8 (n, channels, height, width), values 0 .. levels-1.
    labels: int64 (n,) in 0 .. classes-1, or None.
    levels: number of values a picture can take.
    classes: number of labels, or None without labels.
    class_names: what each label stands for; the numbers themselves by default.
    origin: what `reload_data` needs to load the same pictures again.
    """

    name: str
    pictures: Tensor
    labels: Tensor | None
    levels: int
    classes: int | None
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        pictures, labels = self.pictures, self.labels
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.numel() == 0:
            raise DataError(
                f"{self.name} has pictures of dtype {pictures.dtype} and shape {tuple(pictures.shape)}, but expected "
                "torch.uint8 (n, channels, height, width), none of them 0"
            )
        if not 2 <= self.levels <= 256 or int(pictures.max()) >= self.levels:
            raise DataError(
                f"{self.name} has {self.levels} levels and values up to {int(pictures.max())}, but expected 2 .. 256 "
                "levels and values below that number"
            )
        if (labels is None) != (self.classes is None):
            raise DataError(f"{self.name} has classes {self.classes}, but {'no' if labels is None else 'some'} labels")
        if labels is not None and self.classes is not None:
            if labels.dtype != torch.int64 or labels.shape != (len(pictures),):
                raise DataError(
                    f"{self.name} has labels of dtype {labels.dtype} and shape {tuple(labels.shape)}, but expected "
                    f"torch.int64 ({len(pictures)},)"
                )
            if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
                raise DataError(
                    f"{self.name} has labels in {int(labels.min())} .. {int(labels.max())}, but expected "
                    f"0 .. {self.classes - 1}"
                )
            if not self.class_names:
                object.__setattr__(self, "class_names", tuple(str(label) for label in range(self.classes)))

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one picture."""
        _, channels, height, width = self.pictures.shape
        return channels, height, width

    def values(self, index: Tensor | slice | None = None) -> Tensor:
        """The pictures at `index` (all by default) as a model takes them: float32 in [-1, 1]."""
        chosen = self.pictures if index is None else self.pictures[index]
        return chosen.float() * (2 / (self.levels - 1)) - 1

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, pictures=self.pictures.to(device), labels=labels)

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Training and test pictures: disjoint, fixed by the seed, and each class in both in its proportion.

        The test part has round(fraction * n) pictures, and of each class within one of that share; both keep the order
        of the data. Raises ValueError if a part would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is {fraction}, but expected a number between 0 and 1")
        if not 0 < round(len(self) * fraction) < len(self):
            raise ValueError(
                f"{self.name} has {_pictures(len(self))}, but at least {_fewest(fraction)} are needed to train on some "
                "and hold out others"
            )
        test = self._test_rows(fraction, seed)
        train = np.setdiff1d(np.arange(len(self)), test)
        part = {"fraction": fraction, "seed": seed}
        return self._part(train, {**part, "part": "train"}), self._part(test, {**part, "part": "test"})

    def fingerprint(self) -> str:
        """A digest of pictures and labels, to tell whether a run goes on with the data it began with."""
        digest = hashlib.sha256(f"{tuple(self.pictures.shape)} {self.levels} {self.classes}".encode())
        digest.update(self.pictures.cpu().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _test_rows(self, fraction: float, seed: int) -> NDArray[np.int64]:
        order = permutation(len(self), seed).numpy()
        labels = np.zeros(len(self), np.int64) if self.labels is None else self.labels.cpu().numpy()
        counts = np.bincount(labels)
        shares = counts * fraction
        quotas = np.floor(shares).astype(np.int64)
        # The rows that rounding down left over go to the classes that lost most by it.
        missing = round(len(self) * fraction) - int(quotas.sum())
        quotas[np.argsort(quotas - shares, kind="stable")[: max(missing, 0)]] += 1
        rows = [order[labels[order] == label][:quota] for label, quota in enumerate(quotas)]
        return np.sort(np.concatenate(rows))

    def _part(self, rows: NDArray[np.int64], split: dict[str, Any]) -> Dataset:
        index = torch.from_numpy(rows).to(self.pictures.device)
        return dataclasses.replace(
            self,
            pictures=self.pictures[index],
            labels=None if self.labels is None else self.labels[index],
            origin={**self.origin, "splits": [*self.origin.get("splits", []), split]},
        )


def load_data(spec: str | Path, *, size: int | None = None, colour: bool | None = None) -> Dataset:
    """Pictures from a source.

    spec: "digits" or "photographs", which come with scikit-learn, or a path: a folder of image files (one sub-folder
        per class, if it has any), an IDX file or a folder with MNIST's training files (.gz or not), an NPZ file. A
        folder called digits is "./digits".
    size, colour: for a folder of image files, see `sources.read_folder`.

    Raises DataError, with one sentence that names the file and what was expected, for whatever cannot be used.
    """
    path = Path(spec).expanduser()
    name = str(spec) if str(spec) in BUILT_IN else path.resolve().name
    if size is not None and size < 1:
        raise DataError(f"size is {size}, but expected a positive number of pixels")
    kind, source = _read(str(spec), path, size, colour)
    if kind != "folder" and (size, colour) != (None, None):
        raise DataError(f"size and colour apply to a folder of image files, but {spec} is not one")
    return Dataset(
        name=name,
        pictures=torch.from_numpy(source.pictures),
        labels=None if source.labels is None else torch.from_numpy(source.labels),
        levels=source.levels,
        classes=None if source.labels is None else len(source.class_names),
        class_names=source.class_names,
        origin={"spec": name if kind == "built in" else str(path.resolve()), "size": size, "colour": colour},
    )


def reload_data(origin: dict[str, Any], *, part: str | None = None) -> Dataset:
    """The data of a checkpoint: `load_data` and `split` as `origin` says.

    part: "train" or "test", to have that part of the last split instead of the one that `origin` is of.

    Raises DataError where the origin names no source, which is so of pictures that did not come from `load_data`.
    """
    if "spec" not in origin:
        raise DataError("the data did not come from load_data and cannot be loaded again: give them by name or path")
    data = load_data(origin["spec"], size=origin.get("size"), colour=origin.get("colour"))
    splits = origin.get("splits", [])
    for number, split in enumerate(splits):
        wanted = part if part is not None and number == len(splits) - 1 else split["part"]
        data = data.split(split["fraction"], split["seed"])[("train", "test").index(wanted)]
    return data


def permutation(n: int, seed: int, epoch: int = 0) -> Tensor:
    """The numbers 0 .. n-1 in an order that is a pure function of (seed, epoch), int64 (n,)."""
    root: NDArray[np.uint64] = np.full(1, seed % 2**64, dtype=np.uint64)
    start = _mix(_mix(root) + np.uint64(epoch))
    keys = _mix(start + np.arange(n, dtype=np.uint64))
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def is_picture_folder(spec: str | Path) -> bool:
    """Whether `load_data` would read a folder of image files, which is what a size applies to."""
    path = Path(spec).expanduser()
    return str(spec) not in BUILT_IN and path.is_dir() and sources.idx_file_in(path) is None


def _pictures(n: int) -> str:
    return f"{n} picture{'' if n == 1 else 's'}"


def _fewest(fraction: float) -> int:
    """How many pictures a split needs so that rounding leaves no part empty."""
    return next(
        n for n in itertools.count(math.floor(0.5 / min(fraction, 1 - fraction))) if 0 < round(n * fraction) < n
    )


def _mix(z: NDArray[Any]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def _read(spec: str, path: Path, size: int | None, colour: bool | None) -> tuple[str, Source]:
    if spec in BUILT_IN:
        return "built in", sources.read_digits() if spec == "digits" else sources.read_photographs()
    if not path.exists():
        near = difflib.get_close_matches(spec, BUILT_IN, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{spec} does not exist, but expected {' or '.join(map(repr, BUILT_IN))} or a path{meant}")
    if path.is_dir():
        idx = sources.idx_file_in(path)
        if idx is not None:
            return "file", sources.read_idx(idx)
        return "folder", sources.read_folder(path, size=size, colour=colour)
    if path.suffix == ".npz":
        return "file", sources.read_npz(path)
    if "idx" in path.name:
        return "file", sources.read_idx(path)
    raise DataError(f"{spec} is neither a folder nor an .npz file nor an IDX file (with idx3 in its name)")

"""Readers of pictures: scikit-learn's digits and photographs, folders of image files, IDX and NPZ files.

IDX: two zero bytes, a type byte (8 for unsigned bytes), the number of dimensions, each size as a big-endian 32-bit
number, then the values in row-major order (LeCun, Cortes and Burges, the MNIST database).
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pygen.workbench import require

PATCH = 32
PICTURE_KEYS = ("pictures", "images", "x", "X", "x_train", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "Y", "y_train", "targets", "arr_1")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what is in it and what was expected."""


class Source(NamedTuple):
    """Pictures as read: uint8 (n, channels, height, width) in 0 .. levels-1, and labels int64 (n,) if there are any."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    levels: int
    class_names: tuple[str, ...]  # one per label value; empty without labels


def read_digits() -> Source:
    """The 1797 handwritten digits of scikit-learn, 1 x 8 x 8 in 17 levels (Alpaydin and Kaynak 1998, CC BY 4.0)."""
    digits = require("sklearn.datasets", "the digits").load_digits()
    pictures = digits.images.astype(np.uint8)[:, None]
    return Source(pictures, digits.target.astype(np.int64), 17, tuple(str(digit) for digit in range(10)))


def read_photographs() -> Source:
    """The two photographs of scikit-learn as 3 x 32 x 32 patches side by side; a label says which photograph."""
    require("PIL.Image", "the photographs")
    photographs = require("sklearn.datasets", "the photographs").load_sample_images()
    patches = [_patches(picture) for picture in photographs.images]
    labels = np.repeat(np.arange(len(patches), dtype=np.int64), [len(rows) for rows in patches])
    names = tuple(Path(name).stem for name in photographs.filenames)
    return Source(np.concatenate(patches), labels, 256, names)


def _patches(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = picture.shape[0] // PATCH, picture.shape[1] // PATCH
    cut = picture[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, PATCH, PATCH))


def read_folder(folder: Path, *, size: int | None = None, colour: bool | None = None) -> Source:
    """The image files in a folder, or in its sub-folders, one per class, in the order of their names.

    size: every picture is scaled and cropped about its centre to size x size; without it all must have one size.
    colour: True for three channels, False for one; None makes it one where every file is grey.

    Transparent pictures are laid on white. A single sub-folder makes no labels.

    Raises DataError for a folder without pictures and a file that is corrupt, deeper than 8 bits or of another size.
    """
    groups = _picture_files(folder)
    pictures: list[NDArray[np.uint8]] = []
    first: Path | None = None
    for path in (path for paths in groups.values() for path in paths):
        picture = _read_picture(path, size, colour)
        if first is None:
            first = path
        elif picture.shape[1:] != pictures[0].shape[1:]:
            raise DataError(
                f"{path} is {picture.shape[2]} x {picture.shape[1]} pixels, but {first} is {pictures[0].shape[2]} x "
                f"{pictures[0].shape[1]}: give a size to scale and crop all pictures to"
            )
        pictures.append(picture)
    channels = max(len(picture) for picture in pictures)
    stacked = np.stack([np.broadcast_to(picture, (channels, *picture.shape[1:])) for picture in pictures])
    if len(groups) == 1:
        return Source(stacked, None, 256, ())
    labels = np.repeat(np.arange(len(groups), dtype=np.int64), [len(paths) for paths in groups.values()])
    return Source(stacked, labels, 256, tuple(groups))


def _picture_files(folder: Path) -> dict[str, list[Path]]:
    endings = {ending.lower() for ending in require("PIL.Image", f"the pictures in {folder}").registered_extensions()}

    def visible(inside: Path) -> list[Path]:
        try:
            return sorted(path for path in inside.iterdir() if path.name[0] not in "._")
        except OSError as error:
            raise DataError(f"{inside} cannot be read: {error.strerror or error}") from None

    entries = visible(folder)
    beside = [path for path in entries if path.suffix.lower() in endings and path.is_file()]
    inside = {
        path.name: [file for file in visible(path) if file.suffix.lower() in endings and file.is_file()]
        for path in entries
        if path.is_dir()
    }
    if beside and any(inside.values()):
        raise DataError(
            f"{folder} holds pictures beside its sub-folders and in them ({', '.join(n for n in inside if inside[n])}),"
            " but expected either pictures alone or one sub-folder per class"
        )
    if beside:
        return {"": beside}
    if not any(inside.values()):
        raise DataError(f"{folder} holds no pictures, but expected image files (such as .png), or sub-folders of them")
    for name, paths in inside.items():
        if not paths:
            raise DataError(f"{folder / name} holds no pictures, but expected the image files of class {name!r}")
    return inside


def _read_picture(path: Path, size: int | None, colour: bool | None) -> NDArray[np.uint8]:
    image_module: Any = require("PIL.Image", f"the picture {path}")
    operations: Any = require("PIL.ImageOps", f"the picture {path}")
    try:
        with image_module.open(path) as opened:
            mode = opened.mode
            if mode in _GREY_MODES + _COLOUR_MODES:
                image = operations.exif_transpose(opened)
                if "A" in image.getbands() or "transparency" in image.info:
                    image = image.convert("RGBA")
                    white = image_module.new("RGBA", image.size, "white")
                    image = image_module.alpha_composite(white, image)
                grey = mode in _GREY_MODES if colour is None else not colour
                image = image.convert("L" if grey else "RGB")
                if size is not None:
                    image = operations.fit(image, (size, size), image_module.Resampling.LANCZOS)
                values = np.asarray(image, dtype=np.uint8)
                return values[None] if grey else np.ascontiguousarray(values.transpose(2, 0, 1))
    except Exception as error:  # each of Pillow's decoders raises its own kinds on a broken file
        raise DataError(f"{path} cannot be read as a picture: {_first_line(error)}") from error
    raise DataError(f"{path} has pixels of type {mode}, but expected 8 bits per channel, grey or colour")


def idx_file_in(folder: Path) -> Path | None:
    """The IDX file of training pictures in a folder (MNIST's names, .gz or not), or None where there is none.

    Raises DataError where it could be one of several.
    """
    found = sorted(path for path in folder.glob("*images[-.]idx3-ubyte*") if path.suffix in ("", ".gz", ".idx3-ubyte"))
    if len(found) > 1:
        found = [path for path in found if path.name.startswith("train-")] or found
    if len({path.name.removesuffix(".gz") for path in found}) > 1:
        raise DataError(f"{folder} holds several IDX files: name one of {', '.join(path.name for path in found)}")
    return found[0] if found else None


def read_idx(path: Path) -> Source:
    """The pictures of an IDX file, (n, height, width) unsigned bytes, plain or gzipped.

    Labels are read from the file beside it whose name has "labels" for "images" and "idx1" for "idx3", if there is one.

    Raises DataError for a file that is not IDX, is shorter or longer than its header says, or has other dimensions, and
    where the numbers of pictures and of labels differ.
    """
    pictures = _idx_values(path, 3, "(pictures, height, width)")
    _expect_pictures(path, pictures.shape)
    labels_path = _labels_beside(path)
    if labels_path is None:
        return Source(pictures[:, None], None, 256, ())
    labels, names = _dense(labels_path, _idx_values(labels_path, 1, "(labels,)"), path, len(pictures))
    return Source(pictures[:, None], labels, 256, names)


def _labels_beside(path: Path) -> Path | None:
    if "images" not in path.name:
        return None
    plain = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    candidates = (path.with_name(plain), path.with_name(f"{plain}.gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _idx_values(path: Path, dimensions: int, meaning: str) -> NDArray[np.uint8]:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not zipped:
                return _parse_idx(path, file, dimensions, meaning)
            with gzip.GzipFile(fileobj=file) as inner:
                return _parse_idx(path, inner, dimensions, meaning)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from error


def _parse_idx(path: Path, file: BinaryIO | gzip.GzipFile, dimensions: int, meaning: str) -> NDArray[np.uint8]:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0":
        raise DataError(f"{path} is not an IDX file: it starts with {start!r}, but expected two zero bytes")
    if start[2] != 8:
        raise DataError(f"{path} holds values of IDX type {start[2]:#04x}, but expected 0x08, unsigned bytes")
    if start[3] != dimensions:
        raise DataError(f"{path} has {start[3]} dimensions, but expected {dimensions}: {meaning}")
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataError(f"{path} ends within its header of {4 + 4 * dimensions} bytes")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    expected = math.prod(shape)
    body = bytearray()
    # In pieces, so that a corrupt header does not ask for the memory it announces.
    while len(body) <= expected and (piece := file.read(min(1 << 20, expected + 1 - len(body)))):
        body += piece
    if len(body) != expected:
        came = f"{len(body)} bytes" if len(body) < expected else "more"
        raise DataError(f"{path} announces {shape}, {expected} bytes of values, but holds {came}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_npz(path: Path) -> Source:
    """The pictures of an NPZ file: integers (n, height, width), (n, channels, height, width) or channels last.

    Pictures go by one of the names PICTURE_KEYS, labels (n,) by one of LABEL_KEYS. Pictures have 256 levels, or the
    number in the file under the name "levels". Nothing is unpickled.

    Raises DataError for a file that is corrupt or holds pickles, and arrays of other names, types, shapes or values.
    """
    arrays = _npz_arrays(path)
    if "pictures" not in arrays:
        raise DataError(
            f"{path} has the arrays {', '.join(arrays['names']) or '(none)'}, but expected pictures under one of the "
            f"names {', '.join(PICTURE_KEYS)}"
        )
    pictures = arrays["pictures"]
    if pictures.dtype.kind not in "iu":
        raise DataError(f"{path} has pictures of dtype {pictures.dtype}, but expected integers, best uint8")
    _expect_pictures(path, pictures.shape)
    if pictures.ndim == 3:
        pictures = pictures[:, None]
    elif pictures.ndim == 4 and pictures.shape[1] not in (1, 3) and pictures.shape[3] in (1, 3):
        pictures = pictures.transpose(0, 3, 1, 2)
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise DataError(
            f"{path} has pictures of shape {arrays['pictures'].shape}, but expected (n, height, width), (n, 1 or 3, "
            "height, width) or (n, height, width, 1 or 3)"
        )
    levels = 256
    if "levels" in arrays:
        if arrays["levels"].shape != () or arrays["levels"].dtype.kind not in "iu" or not 2 <= arrays["levels"] <= 256:
            raise DataError(f"{path} has levels {arrays['levels']}, but expected one whole number in 2 .. 256")
        levels = int(arrays["levels"])
    low, high = int(pictures.min()), int(pictures.max())
    if low < 0 or high >= levels:
        raise DataError(f"{path} has pictures with values in {low} .. {high}, but expected 0 .. {levels - 1}")
    pictures = np.ascontiguousarray(pictures, dtype=np.uint8)
    if "labels" not in arrays:
        return Source(pictures, None, levels, ())
    labels, names = _dense(path, arrays["labels"], path, len(pictures))
    return Source(pictures, labels, levels, names)


def _npz_arrays(path: Path) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays["names"] = list(file.files)
            for name, keys in {"pictures": PICTURE_KEYS, "labels": LABEL_KEYS, "levels": ("levels",)}.items():
                key = next((key for key in keys if key in file.files), None)
                if key is not None:
                    arrays[name] = file[key]
    except Exception as error:  # zipfile, zlib and NumPy each raise their own kinds on a broken file
        raise DataError(f"{path} cannot be read as an NPZ file: {_first_line(error)}") from error
    return arrays


def _dense(path: Path, labels: NDArray[Any], of: Path, n: int) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as 0 .. classes-1, because a class that has no pictures cannot be learnt, and what they were called."""
    if labels.dtype.kind not in "iub":
        raise DataError(f"{path} has labels of dtype {labels.dtype}, but expected integers")
    if labels.ndim != 1:
        raise DataError(f"{path} has labels of shape {labels.shape}, but expected ({n},)")
    if len(labels) != n:
        raise DataError(f"{path} has {len(labels)} labels, but {of} has {n} pictures")
    found, dense = np.unique(labels, return_inverse=True)
    return dense.astype(np.int64), tuple(str(value) for value in found)


def _expect_pictures(path: Path, shape: tuple[int, ...]) -> None:
    if math.prod(shape) == 0:
        raise DataError(f"{path} holds no pictures: its array has shape {shape}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

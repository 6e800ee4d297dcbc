"""Data: what is read from each source, what is refused and how, the split, and the order of an epoch."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pygen.model import GenerativeModel, ModelConfig
from pygen.workbench.data import DataError, Dataset, load_data, permutation, reload_data

pytest.importorskip("sklearn")
Image: Any = pytest.importorskip("PIL.Image")

NUMBERS = np.random.default_rng(0)


def idx(values: np.ndarray[Any, Any]) -> bytes:
    return (
        struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )


def byte_values(*shape: int) -> np.ndarray[Any, Any]:
    return NUMBERS.integers(0, 256, shape, dtype=np.uint8)


def save_picture(path: Path, values: np.ndarray[Any, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def dataset(labels: list[int] | None, n: int | None = None) -> Dataset:
    n = len(labels) if labels is not None else n
    assert n is not None
    return Dataset(
        name="some",
        pictures=torch.arange(n).remainder(5).to(torch.uint8).view(n, 1, 1, 1),
        labels=None if labels is None else torch.tensor(labels),
        levels=5,
        classes=None if labels is None else max(labels) + 1,
    )


def refused(spec: Path | str, *says: str, **options: Any) -> None:
    """One sentence that says all of this."""
    with pytest.raises(DataError) as caught:
        load_data(spec, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in says:
        assert part in text, text


def test_digits() -> None:
    data = load_data("digits")
    assert (data.name, len(data), data.shape, data.levels, data.classes) == ("digits", 1797, (1, 8, 8), 17, 10)
    assert data.class_names == tuple("0123456789")
    assert data.pictures.dtype == torch.uint8
    assert int(data.pictures.max()) == 16
    train, test = data.split()
    assert (len(train), len(test)) == (1438, 359)
    assert train.labels is not None
    assert test.labels is not None
    # As figures, so that a change of the split, which every comparison rests on, does not go unnoticed.
    assert test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert test.labels[:12].tolist() == [0, 4, 8, 8, 2, 4, 8, 9, 9, 1, 6, 6]


def test_photographs() -> None:
    from sklearn.datasets import load_sample_images

    data = load_data("photographs")
    assert (len(data), data.shape, data.levels, data.classes) == (520, (3, 32, 32), 256, 2)
    assert data.class_names == ("china", "flower")
    photograph = load_sample_images().images[1]
    patch = torch.from_numpy(photograph[64:96, 96:128].transpose(2, 0, 1).copy())
    assert torch.equal(data.pictures[260 + 2 * 20 + 3], patch)
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [260, 260]


def test_values_are_what_a_model_calls_them() -> None:
    class Plain(GenerativeModel):
        def sample(self, *_: Any, **__: Any) -> Any: ...
        def trajectory(self, *_: Any, **__: Any) -> Any: ...
        def network_passes(self, *_: Any, **__: Any) -> Any: ...
        def loss(self, *_: Any, **__: Any) -> Any: ...

    for levels in (2, 3, 17, 256):
        model = Plain(ModelConfig(shape=(1, 1, levels), levels=levels, classes=None))
        pictures = torch.arange(levels).to(torch.uint8).view(1, 1, 1, levels)
        data = Dataset(name="all", pictures=pictures, labels=None, levels=levels, classes=None)
        x = data.values()
        assert torch.equal(x, model.dequantize(pictures))
        assert torch.equal(model.quantize(x), pictures.long())
        assert x.dtype == torch.float32
        assert float(x[0, 0, 0, 0]) == -1
    index = torch.tensor([4, 0, 4])
    data = load_data("digits")
    assert torch.equal(data.values(index), data.values()[index])
    assert torch.equal(data.values(slice(3, 5)), data.values()[3:5])


labels_lists = st.integers(1, 5).flatmap(
    lambda classes: st.lists(st.integers(0, classes - 1), min_size=2, max_size=60).map(lambda x: [*x, *range(classes)])
)


@given(labels_lists, st.floats(0.1, 0.9), st.integers(0, 2**70))
def test_split_is_disjoint_fixed_and_stratified(labels: list[int], fraction: float, seed: int) -> None:
    assume(0 < round(len(labels) * fraction) < len(labels))
    whole = dataset(labels)
    numbered = Dataset(
        name="numbered",
        pictures=torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1),
        labels=whole.labels,
        levels=256,
        classes=whole.classes,
    )
    train, test = numbered.split(fraction, seed)
    rows = [part.pictures.flatten().tolist() for part in (train, test)]
    assert sorted(rows[0] + rows[1]) == list(range(len(labels)))
    assert rows == [sorted(part) for part in rows]
    assert len(test) == round(len(labels) * fraction)
    for part in (train, test):
        assert part.labels is not None
        assert part.labels.tolist() == [labels[row] for row in part.pictures.flatten().tolist()]
        assert (part.classes, part.levels, part.class_names) == (whole.classes, 256, whole.class_names)
    for label in set(labels):
        count = sum(labels[row] == label for row in rows[1])
        assert abs(count - labels.count(label) * fraction) < 1 + 1e-9
    again = numbered.split(fraction, seed)
    assert [part.fingerprint() for part in again] == [train.fingerprint(), test.fingerprint()]


def test_split_depends_on_the_seed_and_needs_no_labels() -> None:
    data = dataset(None, 50)
    first, other = data.split(0.3, 0)[1], data.split(0.3, 1)[1]
    assert len(first) == len(other) == 15
    assert first.fingerprint() != other.fingerprint()
    for fraction in (-0.1, 0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"fraction is {fraction}, but expected a number between 0 and 1"):
            data.split(fraction)
    for fraction, fewest in ((0.009, 56), (0.995, 101)):
        with pytest.raises(ValueError, match=f"has 50 pictures, but at least {fewest} are needed to train on some"):
            data.split(fraction)
        assert all(len(part) > 0 for part in dataset(None, fewest).split(fraction))


@given(st.integers(1, 500), st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40))
def test_permutation(n: int, seed: int, epoch: int) -> None:
    order = permutation(n, seed, epoch)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, permutation(n, seed, epoch))


def test_permutations_differ_and_are_even() -> None:
    orders = {tuple(permutation(20, seed, epoch).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    # Each picture is in the first batch of 5 of 20 with probability 1/4: 1000 +- 27 of 4000 epochs.
    counts = torch.stack([permutation(20, 3, epoch)[:5] for epoch in range(4000)]).flatten().bincount(minlength=20)
    assert (counts - 1000).abs().max() < 4.5 * 27


def test_permutation_against_whole_numbers() -> None:
    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert mix(1234567) == 6457827717110365317  # the first number of SplitMix64 from this seed
    for seed, epoch in ((0, 0), (5, 1), (-1, 2**40)):
        start = mix(seed % 2**64) + epoch
        keys = [mix((mix(start % 2**64) + i) % 2**64) for i in range(50)]
        assert permutation(50, seed, epoch).tolist() == sorted(range(50), key=keys.__getitem__)


def test_reload_finds_the_same_pictures(tmp_path: Path) -> None:
    train, test = load_data("digits").split(0.3, 4)
    smaller, rest = train.split(0.1, 5)
    assert reload_data(train.origin).fingerprint() == train.fingerprint()
    assert reload_data(train.origin, part="test").fingerprint() == test.fingerprint()
    assert reload_data(smaller.origin, part="test").fingerprint() == rest.fingerprint()
    save_picture(tmp_path / "a.png", byte_values(6, 8, 3))
    folder = load_data(tmp_path, size=4, colour=False)
    assert reload_data(folder.origin).fingerprint() == folder.fingerprint()
    with pytest.raises(DataError, match="did not come from load_data"):
        reload_data(dataset([0, 1]).origin)


def test_fingerprint_sees_every_change() -> None:
    first = dataset([0, 1, 0, 1])
    others = [dataset([0, 1, 1, 0]), dataset(None, 4), dataset([0, 1, 0, 1, 0])]
    changed = first.pictures.clone()
    changed[2] += 1
    others.append(Dataset(name="some", pictures=changed, labels=first.labels, levels=5, classes=2))
    assert len({data.fingerprint() for data in [first, *others]}) == 5
    assert dataset([0, 1, 0, 1]).fingerprint() == first.fingerprint()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pictures": torch.zeros(4, 1, 2, 2)}, "dtype torch.float32"),
        ({"pictures": torch.zeros(4, 2, 2, dtype=torch.uint8)}, r"shape \(4, 2, 2\)"),
        ({"pictures": torch.zeros(0, 1, 2, 2, dtype=torch.uint8)}, r"shape \(0, 1, 2, 2\)"),
        ({"levels": 3}, "3 levels and values up to 3"),
        ({"levels": 1}, "1 levels"),
        ({"labels": None}, "classes 2, but no labels"),
        ({"classes": None}, "classes None, but some labels"),
        ({"labels": torch.tensor([0, 1, 0])}, r"shape \(3,\), but expected torch.int64 \(4,\)"),
        ({"labels": torch.tensor([0.0, 1, 0, 1])}, "dtype torch.float32"),
        ({"labels": torch.tensor([0, 1, 2, 1])}, r"labels in 0 .. 2, but expected 0 .. 1"),
        ({"labels": torch.tensor([0, -1, 0, 1])}, r"labels in -1 .. 1"),
    ],
)
def test_a_dataset_refuses_what_does_not_fit_together(change: dict[str, Any], says: str) -> None:
    good = {"name": "it", "pictures": dataset(None, 4).pictures, "labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(DataError, match=f"^it has .*{says}"):
        Dataset(**{**good, "levels": 5, "classes": 2, **change})


def test_unknown_sources() -> None:
    refused("digit", "digit does not exist", "did you mean 'digits'?")
    refused("nowhere/at/all", "nowhere/at/all does not exist", "'digits' or 'photographs' or a path")
    refused("digits", "size and colour apply to a folder", size=8)
    refused("digits", "size is 0", size=0)
    refused(__file__, "neither a folder nor an .npz file nor an IDX file")


# Folders of image files


def test_folder_of_grey_and_of_colour(tmp_path: Path) -> None:
    values = byte_values(3, 4, 6)
    for number in (2, 0, 1):
        save_picture(tmp_path / f"{number}.png", values[number])
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    (tmp_path / "empty").mkdir()
    data = load_data(str(tmp_path))
    assert (data.name, data.shape, data.labels, data.levels) == (tmp_path.name, (1, 4, 6), None, 256)
    assert np.array_equal(data.pictures[:, 0].numpy(), values)
    assert load_data(tmp_path, colour=True).shape == (3, 4, 6)

    colour = byte_values(4, 6, 3)
    save_picture(tmp_path / "3.png", colour)
    data = load_data(tmp_path)
    assert data.shape == (3, 4, 6)
    assert np.array_equal(data.pictures[3].numpy(), colour.transpose(2, 0, 1))
    assert np.array_equal(data.pictures[1, 2].numpy(), values[1])
    assert load_data(tmp_path, colour=False).shape == (1, 4, 6)


def test_folder_with_classes(tmp_path: Path) -> None:
    for name, count in (("dog", 2), ("cat", 3), (".git", 1), ("__MACOSX", 1)):
        for number in range(count):
            save_picture(tmp_path / name / f"{number}.bmp", byte_values(4, 4))
    data = load_data(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    (tmp_path / "bird").mkdir()
    refused(tmp_path, "bird holds no pictures", "class 'bird'")
    (tmp_path / "bird").rmdir()
    save_picture(tmp_path / "beside.png", byte_values(4, 4))
    refused(tmp_path, "beside its sub-folders and in them (cat, dog)")


def test_one_sub_folder_makes_no_labels(tmp_path: Path) -> None:
    save_picture(tmp_path / "only" / "a.png", byte_values(4, 4))
    assert load_data(tmp_path).labels is None


def test_size_scales_and_crops_about_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 200
    save_picture(tmp_path / "wide.png", wide)
    save_picture(tmp_path / "tall.png", wide.T.copy())
    refused(tmp_path, "wide.png is 24 x 8 pixels, but", "tall.png is 8 x 24", "give a size")
    cropped = load_data(tmp_path, size=8)
    assert cropped.shape == (1, 8, 8)
    assert (cropped.pictures == 200).all()
    scaled = load_data(tmp_path, size=4)
    assert scaled.shape == (1, 4, 4)
    assert ((scaled.pictures.float() - 200).abs() < 20).all()


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    save_picture(tmp_path / "clear.png", clear)
    data = load_data(tmp_path)
    assert data.pictures[0, :, 0, 0].tolist() == [10, 20, 30]
    assert data.pictures[0, :, 1, 1].tolist() == [255, 255, 255]


def test_a_turned_photograph_is_turned_back(tmp_path: Path) -> None:
    values = byte_values(2, 4)
    image = Image.fromarray(values)
    tags = image.getexif()
    tags[0x0112] = 3
    image.save(tmp_path / "turned.png", exif=tags)
    assert np.array_equal(load_data(tmp_path).pictures[0, 0].numpy(), values[::-1, ::-1])


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    refused(tmp_path, f"{tmp_path} holds no pictures")
    save_picture(tmp_path / "good.png", byte_values(4, 4))
    bad = tmp_path / "later.png"
    bad.write_bytes(b"not a picture at all")
    refused(tmp_path, f"{bad} cannot be read as a picture")
    whole = io.BytesIO()
    Image.fromarray(byte_values(64, 64)).save(whole, "PNG")
    bad.write_bytes(whole.getvalue()[:2000])
    refused(tmp_path, f"{bad} cannot be read as a picture")
    bad.write_bytes(b"")
    refused(tmp_path, f"{bad} cannot be read as a picture")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(bad)
    refused(tmp_path, f"{bad} has pixels of type I;16, but expected 8 bits")


# IDX files


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
def test_idx(tmp_path: Path, name: str) -> None:
    pictures, labels = byte_values(5, 3, 4), np.array([3, 7, 3, 9, 7], np.uint8)
    pack: Callable[[bytes], bytes] = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(idx(pictures)))
    assert load_data(tmp_path).labels is None
    (tmp_path / name.replace("images", "labels").replace("idx3", "idx1")).write_bytes(pack(idx(labels)))
    (tmp_path / name.replace("train", "t10k")).write_bytes(b"the test set, which is not asked for")
    for spec in (tmp_path, tmp_path / name):
        data = load_data(spec)
        assert np.array_equal(data.pictures[:, 0].numpy(), pictures)
        assert data.labels is not None
        assert data.labels.tolist() == [0, 1, 0, 2, 1]
        assert (data.classes, data.class_names) == (3, ("3", "7", "9"))


def test_several_idx_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(byte_values(2, 2, 2)))
    refused(tmp_path, "several IDX files: name one of a-images-idx3-ubyte, b-images-idx3-ubyte")


GOOD = idx(byte_values(5, 3, 4))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an IDX file: it starts with b''"),
        (b"\x89PNG and so on", "not an IDX file"),
        (GOOD[:10], "ends within its header of 16 bytes"),
        (GOOD[:-1], "announces (5, 3, 4), 60 bytes of values, but holds 59 bytes"),
        (GOOD + b"x", "60 bytes of values, but holds more"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "IDX type 0x0d, but expected 0x08"),
        (idx(byte_values(5)), "1 dimensions, but expected 3: (pictures, height, width)"),
        (idx(byte_values(0, 3, 4)), "holds no pictures"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"few", "but holds 3 bytes"),
        (gzip.compress(GOOD, mtime=0)[:-12], "cannot be read"),
        (gzip.compress(GOOD, mtime=0)[:20] + b"\0" * 9, "cannot be read"),
        (gzip.compress(GOOD[:-1], mtime=0), "but holds 59 bytes"),
    ],
)
def test_broken_idx(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    refused(tmp_path, str(path), says)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (idx(byte_values(4)), "has 4 labels, but"),
        (idx(byte_values(5, 1)), "2 dimensions, but expected 1"),
        (idx(byte_values(5))[:-2], "but holds 3 bytes"),
    ],
)
def test_broken_idx_labels(tmp_path: Path, labels: bytes, says: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(GOOD)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(labels)
    refused(tmp_path, str(path), says)


# NPZ files


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 1, 4, 6), (5, 4, 6, 1), (5, 3, 4, 6), (5, 4, 6, 3)])
@pytest.mark.parametrize(("pictures", "labels"), [("pictures", "labels"), ("x", "y"), ("x_train", "y_train")])
def test_npz(tmp_path: Path, shape: tuple[int, ...], pictures: str, labels: str) -> None:
    values = byte_values(*shape)
    path = npz(tmp_path / "some.npz", **{pictures: values.astype(np.int32), labels: np.array([5, -1, 5, -1, 2])})
    data = load_data(path)
    expected = values[:, None] if values.ndim == 3 else values.transpose(0, 3, 1, 2) if shape[1] == 4 else values
    assert np.array_equal(data.pictures.numpy(), expected)
    assert data.pictures.is_contiguous()
    assert data.labels is not None
    assert data.labels.tolist() == [2, 0, 2, 0, 1]
    assert data.class_names == ("-1", "2", "5")


def test_npz_with_levels_and_without_labels(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path / "a.npz", images=np.array([[[0, 16]]], np.uint8), levels=17))
    assert (data.levels, data.classes, len(data)) == (17, None, 1)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (
            {"pixels": byte_values(2, 2, 2)},
            "has the arrays pixels, but expected pictures under one of the names pictures,",
        ),
        ({"x": byte_values(2, 2, 2).astype(np.float32)}, "dtype float32, but expected integers"),
        ({"x": np.array([[[-1]]])}, "values in -1 .. -1, but expected 0 .. 255"),
        ({"x": np.array([[[256]]])}, "values in 256 .. 256"),
        ({"x": np.array([[[17]]], np.uint8), "levels": 17}, "values in 17 .. 17, but expected 0 .. 16"),
        ({"x": byte_values(2, 2, 2), "levels": 300}, "levels 300"),
        ({"x": byte_values(2, 2, 2), "levels": np.array([3, 4])}, "levels [3 4]"),
        ({"x": byte_values(2, 2)}, "shape (2, 2), but expected (n, height, width)"),
        ({"x": byte_values(2, 2, 2, 2)}, "shape (2, 2, 2, 2)"),
        ({"x": byte_values(0, 2, 2)}, "holds no pictures"),
        ({"x": byte_values(2, 2, 2), "y": np.zeros(3, int)}, "has 3 labels, but"),
        ({"x": byte_values(2, 2, 2), "y": np.zeros((2, 10), int)}, "labels of shape (2, 10), but expected (2,)"),
        ({"x": byte_values(2, 2, 2), "y": np.zeros(2)}, "labels of dtype float64"),
        ({"x": np.array([None, "picture"], object)}, "cannot be read as an NPZ file"),
    ],
)
def test_broken_npz_arrays(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    path = npz(tmp_path / "bad.npz", **arrays)
    refused(path, str(path), says)


class Trap:
    sprung = False

    def __reduce__(self) -> Any:
        return setattr, (Trap, "sprung", True)


def test_broken_npz_files_and_no_pickle(tmp_path: Path) -> None:
    good = npz(tmp_path / "good.npz", x=byte_values(9, 8, 8)).read_bytes()
    flipped = bytearray(good)
    flipped[200] ^= 1
    path = tmp_path / "bad.npz"
    for content in (b"", b"text", good[:300], good[:-30], bytes(flipped), pickle.dumps(Trap())):
        path.write_bytes(content)
        refused(path, f"{path} cannot be read as an NPZ file")
    refused(npz(path, x=np.array([Trap()], object)), "cannot be read as an NPZ file")
    assert not Trap.sprung

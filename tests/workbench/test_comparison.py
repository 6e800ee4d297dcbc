"""The comparison on a small part of the digits with hardly any training: its files, their structure, and repetition."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pygen.workbench import comparison, evaluation, report
from pygen.workbench.checkpoint import CheckpointError, load_model
from pygen.workbench.classifier import train_classifier
from pygen.workbench.comparison import compare, in_columns
from pygen.workbench.data import Dataset, load_data
from pygen.workbench.families import FAMILIES, resolve

for package in ("sklearn", "torchmetrics", "matplotlib", "PIL", "safetensors"):
    pytest.importorskip(package)

KEYS = {
    "density",
    "bits_per_dim",
    "frechet",
    "precision",
    "recall",
    "coverage",
    "sample_seconds",
    "network_passes",
    "train_seconds",
    "parameters",
}
COMPARED = ("gan", "diffusion")
SMALL: dict[str, dict[str, Any]] = {
    "gan": {"width": 16},
    "vae": {"width": 16},
    "diffusion": {"width": 16, "sample_steps": 4},
    "flow": {"scales": 2, "steps": 1, "width": 4},
    "autoregressive": {"resolutions": 2, "blocks": 1, "width": 8, "mixtures": 3},
}


def some_digits() -> Dataset:
    digits = load_data("digits")
    assert digits.labels is not None
    return dataclasses.replace(digits, pictures=digits.pictures[:240], labels=digits.labels[:240])


def run(
    out: Path, seed: int, families: tuple[str, ...] = COMPARED, data: Dataset | None = None, **recipes: str
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        for family in families:
            name = resolve(family, recipes.get(family))
            recipe = FAMILIES[family][name]
            training = dataclasses.replace(recipe.training, steps=3, batch_size=16, warmup=0)
            small = dataclasses.replace(recipe, training=training, changes=SMALL[family])
            patch.setitem(FAMILIES, family, {**FAMILIES[family], name: small})
        patch.setattr(comparison, "STEPS", (1, 2, 4))
        patch.setattr(evaluation, "train_classifier", functools.partial(train_classifier, steps=150))
        return compare(data=data or some_digits(), out=out, families=families, recipes=recipes, seed=seed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compare")
    return out, run(out, seed=3)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    if isinstance(value, (list, tuple)):
        return [number for entry in value for number in numbers(entry)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_summary_has_the_promised_structure_and_only_finite_numbers(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"families", "real", "noise", "machine", "seed"} <= summary.keys()
    assert tuple(summary["families"]) == COMPARED
    for row in (*summary["families"].values(), summary["real"], summary["noise"]):
        assert row.keys() >= KEYS
    assert summary["seed"] == 3
    assert all(math.isfinite(number) for number in numbers(summary))
    gan, diffusion = summary["families"]["gan"], summary["families"]["diffusion"]
    assert (gan["density"], gan["bits_per_dim"], gan["network_passes"]) == ("implicit", None, 1)
    assert diffusion["density"] == "lower bound"
    assert (gan["bits_kind"], diffusion["bits_kind"], summary["noise"]["bits_kind"]) == (None, "bound", "exact")
    assert summary["machine"]["threads"] == 1
    assert 0 < diffusion["bits_per_dim"] < 8
    assert summary["noise"]["bits_per_dim"] == pytest.approx(math.log2(17))
    assert summary["real"]["frechet"] < min(row["frechet"] for row in summary["families"].values())
    assert [point["steps"] for point in summary["steps_curve"]] == [1, 2, 4]
    assert summary["steps_curve"][2]["frechet"] == diffusion["frechet"]


def test_the_files_are_there_and_the_report_needs_nothing_else(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    for family in COMPARED:
        assert (out / f"samples_{family}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "@import" not in page
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)|url\(([^)]*)\)""", page)
    assert len(sources) == 1 + len(COMPARED) + 2
    assert all(source[0].startswith("data:image/") for source in sources)
    for text in ("Real pictures", "must lose", "Theis", f"{summary['families']['gan']['frechet']:.2f}"):
        assert text in page


def test_the_table_and_the_path_of_the_report_are_printed_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, seed=0, families=("vae",))
    lines = capsys.readouterr().out.rstrip().split("\n")
    assert lines[-1] == str(tmp_path / "report.html")
    table = lines[lines.index(next(line for line in lines if "Frechet" in line and "recall" in line)) :]
    assert [line.split()[0] for line in table[1:4]] == ["real", "VAE", "noise"]


def test_the_recipe_that_was_asked_for_is_the_one_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(tmp_path, seed=0, families=("flow",), flow="glow")
    assert summary["families"]["flow"]["recipe"] == "glow"
    assert summary["recipes"]["flow"]["model"] == "scales=2, steps=1, width=4"
    assert type(load_model(tmp_path / "checkpoints" / "flow")).__name__ == "Glow"
    assert "Flow (glow)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\nFlow (glow)  exact" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'glwo' is no recipe of the flow family: did you mean 'glow'"):
        run(tmp_path, seed=0, families=("flow",), flow="glwo")


def test_autoregressive_recipes_are_compared_by_their_exact_bits(tmp_path: Path) -> None:
    summary = run(tmp_path, seed=0, families=("autoregressive",), autoregressive="pixelcnn++")
    row = summary["families"]["autoregressive"]
    assert (row["recipe"], row["bits_kind"], row["network_passes"]) == ("pixelcnn++", "exact", 64)
    assert type(load_model(tmp_path / "checkpoints" / "autoregressive")).__name__ == "PixelCNNPP"
    assert "Autoregressive (pixelcnn++)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_numbers(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    # Into the folder of another run, whose checkpoints must not matter and whose pictures must not stay.
    run(tmp_path, seed=1, families=("vae",))
    timed = re.compile("seconds$|^machine$|^versions$")

    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: untimed(entry) for key, entry in value.items() if not timed.search(key)}
        return [untimed(entry) for entry in value] if isinstance(value, list) else value

    again = run(tmp_path, seed=3)
    assert untimed(again) == untimed(finished[1])
    assert {path.name for path in tmp_path.glob("samples_*")} == {f"samples_{family}.png" for family in COMPARED}


def test_data_without_labels_are_compared_too(tmp_path: Path) -> None:
    unlabelled = dataclasses.replace(some_digits(), labels=None, classes=None, class_names=())
    summary = run(tmp_path, seed=0, families=("vae",), data=unlabelled)
    assert summary["classifier"]["accuracy"] is None
    for row in (summary["families"]["vae"], summary["real"], summary["noise"]):
        assert (row["agreement"], row["coverage"]) == (None, None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("how far the real training pictures were turned", "only 4 classes to tell apart", "has no labels"):
        assert text in page
    assert "with its label" not in page


def test_bad_arguments_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'quik' is no budget: did you mean 'quick'"):
        compare(data=some_digits(), out=tmp_path, families=["gan"], budget="quik")
    with pytest.raises(ValueError, match="'gann' is no family: did you mean 'gan'"):
        compare(data=some_digits(), out=tmp_path, families=["gann"])
    with pytest.raises(ValueError, match="families is empty"):
        compare(data=some_digits(), out=tmp_path, families=[])
    odd = dataclasses.replace(some_digits(), pictures=torch.zeros(240, 1, 7, 7, dtype=torch.uint8))
    with pytest.raises(ValueError, match="the family flow does not take the pictures of digits: shape is"):
        compare(data=odd, out=tmp_path, families=["gan", "flow"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/out cannot be written"):
        compare(data=some_digits(), out=tmp_path / "file" / "out", families=["gan"])


def test_small_pictures_take_one_thread_and_give_back_the_others() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with comparison._threads(64):
            assert torch.get_num_threads() == 1
        with comparison._threads(3072):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_report_says_only_what_was_measured(finished: tuple[Path, dict[str, Any]]) -> None:
    summary = json.loads(json.dumps(finished[1]))
    gan, flow = summary["families"]["gan"], summary["families"]["diffusion"]
    summary["families"]["flow"] = {
        **flow,
        "recipe": "realnvp",
        "density": "exact",
        "bits_per_dim": 0.5,
        "bits_kind": "bound",
    }
    sheets = dict.fromkeys(("real", *summary["families"]), b"")
    for fastest, text in ((7.0, "for about the same time"), (1.0, "for a fixed number of steps each")):
        for row in summary["families"].values():
            row["train_seconds"] = 10.0
        gan["train_seconds"] = fastest
        page = report.render(summary, sheets, b"", b"")
        assert text in page
    assert "here took 1.0 s to 10 s" in page
    assert "The flow warrants the fewest bits for held-out pictures (≤ 0.50 per value)" in page
    assert "trained on those very pictures" in page
    assert "one for each training picture and" in page
    assert "≤" not in report.bits(summary["noise"])
    summary["data"]["judged"] -= 1
    assert "evenly spaced training pictures" in report.render(summary, sheets, b"", b"")


def test_shown_pictures_stand_in_columns_by_class() -> None:
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    chosen, columns = in_columns(labels, 2, 6)
    assert columns == 2
    assert labels[chosen].tolist() == [0, 1] * 3
    assert chosen.tolist() == [1, 0, 3, 2, 5, 4]
    chosen, columns = in_columns(None, None, 100)
    assert (columns, chosen.tolist()) == (8, list(range(64)))

"""The command line: help, mistakes, and the way from `train` to `sample` and `evaluate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pygen.workbench.command_line import FAMILY_NAMES, _described, main
from pygen.workbench.families import FAMILIES

for package in ("tyro", "sklearn", "torchmetrics", "PIL", "safetensors"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "gan"
    assert main(["train", "gan", "--steps", "2", "--batch-size", "8", "--model.width", "8", "--out", str(out)]) == 0
    return out


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr that a mistake ends with."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1
    assert lines[0].startswith("pygen: ")
    return lines[0].removeprefix("pygen: ")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the parser says of options that it does not take."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pygen.workbench.command_line import main\nmain(['--help'])\n"
        "sys.exit(bool({'torch', 'numpy', 'tyro', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pygen COMMAND --help" in done.stdout
    assert max(map(len, done.stdout.split("\n"))) <= 80


def test_a_mistake_ends_a_process_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pygen.workbench.command_line", "compare", "--data", str(tmp_path), "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"pygen: {tmp_path} holds no pictures")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["compare", "--help"], ["--data", "--families", "--budget {quick,full}", "--seed", "(default: digits)"]),
        (["train", "--help"], ["FAMILY is one of gan, vae, flow, diffusion, autoregressive"]),
        (
            ["train", "vae", "--help"],
            ["--steps", "--resume", "--model.latent", "weight of the KL term", "--model.beta"],
        ),
        (["sample", "--help"], ["CHECKPOINT", "--count", "--steps", ".npz"]),
        (["evaluate", "--help"], ["CHECKPOINT", "--data", "--json"]),
        (["info", "--help"], ["--json", "instruction set"]),
        (["bench", "--help"], ["bench"]),
    ],
)
def test_each_command_explains_itself(
    arguments: list[str], texts: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    code: object
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 0
    out = " ".join(capfd.readouterr().out.replace("│", " ").split())
    for text in texts:
        assert text in out


def test_unknown_names_get_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["comapre"], capsys) == "there is no command 'comapre': did you mean compare?"
    assert fails(["train", "difusion"], capsys) == "there is no family 'difusion': did you mean diffusion?"
    assert fails(["xyz"], capsys).startswith("there is no command 'xyz': expected one of compare, train")
    assert "--count" in refused(["sample", "somewhere", "--coutn", "3"], capsys)
    assert "--model.width" in refused(["train", "gan", "--model.widht", "3"], capsys)
    assert "--learning-rate" in refused(["train", "gan", "--learning-rat", "3"], capsys)
    assert "gan" in refused(["compare", "--families", "gann"], capsys)


def test_bad_values_get_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path) -> None:
    missing, out = str(tmp_path / "nowhere"), str(tmp_path / "run")
    assert fails(["sample", missing], capsys) == f"{missing} does not exist, but expected a folder that training wrote"
    assert fails(["compare", "--data", "digts"], capsys).endswith("did you mean 'digits'?")
    assert "--count is 0, but expected at least 1" in fails(["sample", str(checkpoint), "--count", "0"], capsys)
    assert "ends in .png or .npz" in fails(["sample", str(checkpoint), "--out", "grid.jpeg"], capsys)
    assert "--label is 10, but the checkpoint has 0 .. 9" in fails(["sample", str(checkpoint), "--label", "10"], capsys)
    assert "steps is 4" in fails(["sample", str(checkpoint), "--steps", "4", "--out", f"{out}.png"], capsys)
    assert "--device is gpu" in fails(["sample", str(checkpoint), "--device", "gpu"], capsys)
    assert "--families is empty" in fails(["compare", "--families"], capsys)
    assert "steps is 0" in fails(["train", "gan", "--steps", "0", "--out", out], capsys)
    assert "width is 0" in fails(["train", "gan", "--model.width", "0", "--out", out], capsys)
    assert "earlier run" in fails(["train", "gan", "--steps", "2", "--out", str(checkpoint)], capsys)


def test_sample_writes_a_grid_and_values(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    grid, values = tmp_path / "grid.png", tmp_path / "deep" / "values.npz"
    assert main(["sample", str(checkpoint), "--count", "20", "--out", str(grid), "--columns", "5"]) == 0
    assert capsys.readouterr().out == f"{grid}\n"
    with Image.open(grid) as image:
        assert image.size == ((5 * 9 + 1) * 5, (4 * 9 + 1) * 5)
    assert main(["sample", str(checkpoint), "--count", "12", "--label", "7", "--seed", "5", "--out", str(values)]) == 0
    with np.load(values) as arrays:
        assert arrays["pictures"].shape == (12, 1, 8, 8)
        assert arrays["pictures"].max() <= 16
        assert arrays["labels"].tolist() == [7] * 12
        assert int(arrays["levels"]) == 17


def test_evaluate_uses_the_data_of_the_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == ["GAN", "real", "noise"]
    assert rows["real"]["frechet"] < rows["GAN"]["frechet"]
    assert rows["GAN"]["bits_per_dim"] is None


def test_info_speaks_and_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert {"libraries", "cpu", "cuda", "operators"} <= facts.keys()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name, devices in facts["operators"].items():
        line = next(line for line in text.split("\n") if line.split()[:1] == [name])
        assert line.split()[1] == ("native" if devices["cpu"]["native"] else "reference")
        assert devices["cuda"]["native"] or devices["cuda"]["why"] in text


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert fails(["info"], capsys).startswith("tyro is not installed, but needed for the command line: pip install")


def test_the_families_of_the_command_line_are_those_of_the_workbench() -> None:
    assert list(FAMILY_NAMES) == list(FAMILIES)


def test_a_docstring_gives_each_option_its_help() -> None:
    text = "A model.\n\n    width: channels: many.\n    a, b: both of them,\n        at once. depth: layers.\n"
    assert _described(text, ["width", "a", "b", "depth"]) == {
        "width": "channels: many.",
        "a": "both of them, at once.",
        "b": "both of them, at once.",
        "depth": "layers.",
    }

"""The command line: help, mistakes, and the way from `train` to `sample` and `evaluate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pygen.workbench import command_line
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
        (["compare", "--help"], ["--flow", "Recipe of the flow family: realnvp, nice", "(default: realnvp)"]),
        (["compare", "--help"], ["--autoregressive", "Recipe of the autoregressive family: gated-pixelcnn, pixelcnn"]),
        (
            ["train", "flow", "--help"],
            ["--recipe", "Which model: realnvp, nice", "--model.couplings", "how often the picture is squeezed"],
        ),
        (["train", "flow", "--recipe", "glow", "--help"], ["--model.steps", "(default: glow)", "runs/flow-glow"]),
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
    assert fails(["compare", "--flow", "glwo"], capsys) == "there is no flow recipe 'glwo': did you mean glow?"
    text = "there is no autoregressive recipe 'wavnet': did you mean wavenet?"
    assert fails(["compare", "--autoregressive", "wavnet"], capsys) == text
    text = "there is no flow recipe 'realnpv': did you mean realnvp?"
    assert fails(["train", "flow", "--recipe", "realnpv"], capsys) == text
    assert fails(["train", "flow", "--steps", "2", "--recipe=realnpv"], capsys) == text
    assert fails(["train", "flow", "--recipe"], capsys).startswith("there is no flow recipe '': expected one of")
    assert "--recipe" in refused(["train", "gan", "--recipe", "gan"], capsys)


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
    assert fails(["train", "--steps", "3", "gan"], capsys).startswith("--steps stands before the family, but expected")
    assert fails(["compare", "--family", "gan"], capsys) == "there is no option --family: did you mean --families?"
    text = "--flow is glow, but --families has no flow"
    assert fails(["compare", "--families", "gan", "--flow", "glow"], capsys) == text
    assert "expected --data with it" in fails(["evaluate", str(checkpoint), "--size", "8"], capsys)
    Path(out).touch()
    assert f"{out} cannot be written" in fails(["train", "gan", "--steps", "2", "--out", out], capsys)
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
    captured = capsys.readouterr()
    assert "digits: 1438 pictures to train on, 359 held out; training the judge" in captured.err
    rows = json.loads(captured.out)
    assert list(rows) == ["GAN", "real", "noise"]
    assert rows["real"]["frechet"] < rows["GAN"]["frechet"]
    assert rows["GAN"]["bits_per_dim"] is None


def test_a_checkpoint_knows_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "2", "--batch-size", "8", "--model.steps", "1", "--model.width", "4"]
    assert main(["train", "flow", "--recipe", "glow", *small]) == 0
    assert main(["sample", "runs/flow-glow", "--count", "4"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "runs/flow-glow", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["Glow", "real", "noise"]
    command = ["train", "flow", "--resume", "--steps", "2", "--batch-size", "8", "--out", "runs/flow-glow"]
    assert "pygen.flows.glow.Glow, but is now to go on with pygen.flows.realnvp.RealNVP" in fails(command, capsys)


def test_evaluate_refuses_what_does_not_fit_before_the_judge_trains(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = np.random.default_rng(0).integers(0, 17, (20, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "plain.npz", pictures=pictures, levels=17)
    np.savez(tmp_path / "single.npz", pictures=pictures[:1], levels=17)
    text = fails(["evaluate", str(checkpoint), "--data", str(tmp_path / "plain.npz")], capsys)
    assert text == "the model was trained with 10 classes, but plain.npz has none"
    text = fails(["evaluate", str(checkpoint), "--data", str(tmp_path / "single.npz")], capsys)
    assert text == "single.npz has 1 picture, but at least 3 are needed to train on some and hold out others"
    assert "steps is 4, but GAN always takes 1" in fails(["evaluate", str(checkpoint), "--steps", "4"], capsys)


def test_a_folder_is_scaled_to_the_size_of_the_model(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for number in range(5):
        Image.new("L", (20, 16), number * 40).save(tmp_path / f"{number}.png")
    command = ["evaluate", str(checkpoint), "--data", str(tmp_path)]
    assert "but " + tmp_path.name + " has shape (1, 8, 8) with 256" in fails(command, capsys)
    assert "has shape (1, 4, 4)" in fails([*command, "--size", "4"], capsys)


def test_runs_that_go_wrong_end_with_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pygen.workbench import evaluation
    from pygen.workbench.families import build

    def broken() -> Any:
        model = build("autoregressive", shape=(1, 8, 8), levels=17, classes=10, width=8)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        return model

    out = ["--out", str(tmp_path / "x.png")]
    with monkeypatch.context() as patch:
        patch.setattr(command_line, "_load", lambda checkpoint, device: broken())
        assert "the parameters are not finite" in fails(["sample", "x", *out], capsys)

    for error, text in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "the memory of the device is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory of the device is full"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "draw", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            assert text in fails(["sample", str(checkpoint), *out], capsys)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(evaluation, "draw", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
        main(["sample", str(checkpoint), *out])
    command = ["train", "gan", "--steps", "20", "--learning-rate", "1e30", "--warmup", "0", "--model.width", "8"]
    capsys.readouterr()
    assert main([*command, "--resume", "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert lines[0] == f"{tmp_path / 'run'} holds no checkpoint to resume: training starts at the first step"
    assert lines[-1].startswith("pygen: the ")
    assert "try a lower learning_rate" in lines[-1]


def test_samples_need_neither_matplotlib_nor_torchmetrics(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(('matplotlib', 'torchmetrics')))\n"
        "from pygen.workbench.command_line import main\n"
        f"sys.exit(main(['sample', {str(checkpoint)!r}, '--out', {str(tmp_path / 'grid.png')!r}]) or "
        f"main(['compare', '--out', {str(tmp_path / 'report')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (tmp_path / "grid.png").is_file(), done.stderr
    assert done.returncode == 2
    assert done.stderr.startswith("pygen: matplotlib is not installed, but needed for a comparison: pip install")


def test_tensorboard_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pygen.workbench import recipes

    asked: dict[str, Any] = {}
    monkeypatch.setattr(recipes, "train_family", lambda *_, **settings: asked.update(settings))
    assert main(["train", "gan", "--tensorboard", "--out", str(tmp_path)]) == 0
    assert asked["tensorboard"] is True


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

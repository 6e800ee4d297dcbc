"""Checkpoints: kills at every moment, damage of every kind, and models rebuilt from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pygen
from pygen.model import GenerativeModel
from pygen.workbench import MissingDependency, families, require
from pygen.workbench.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    load_model,
    model_tensors,
    save_checkpoint,
)
from pygen.workbench.data import load_data
from pygen.workbench.training import TrainingConfig, train

pytest.importorskip("safetensors")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from crash import CONFIG, difference  # noqa: E402
from toys import Toy, build, pictures  # noqa: E402


def crash(*arguments: str) -> subprocess.Popen[str]:
    root = str(Path(pygen.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, str(HERE / "crash.py"), *arguments],
        env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path: Path) -> None:
    process = crash("sweep", str(tmp_path / "sweep"), "duel")
    kills, errors = process.communicate()
    assert process.returncode == 0, errors
    assert int(kills) > 40  # the saving of a checkpoint alone has some 15 moments


def test_a_run_killed_from_outside_resumes_to_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = crash("train", str(folder), "toy")
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 4:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint(folder).step < CONFIG.steps
    resumed = crash("train", str(folder), "toy")
    steps, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert steps.split()[0] == "3"  # the step after the checkpoint, and not the first one

    torch.set_num_threads(1)
    train(build(Toy), pictures(), CONFIG, out=tmp_path / "whole", progress=False)
    assert difference(load_checkpoint(folder), load_checkpoint(tmp_path / "whole")) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = TrainingConfig(steps=4, batch_size=5, checkpoint_every=2, log_every=1, ema_images=30, ema_ramp=None)
    train(build(Toy), pictures(), config, out=folder, progress=False)
    return folder


def test_round_trip(trained: Path) -> None:
    saved = load_checkpoint(trained)
    assert (saved.step, saved.family, saved.config["shape"]) == (4, None, [1, 2, 3])
    assert saved.model_class.endswith("Toy")
    assert [record["step"] for record in saved.history] == [1, 2, 3, 4]
    assert saved.optimizers["model/first.weight/step"] == 4
    assert "again.weight" not in saved.weights
    last, average = build(Toy), build(Toy)
    load_model(trained, ema=False, model=last)
    load_model(trained / "step-00000004" / "ema.safetensors", model=average)
    assert all(torch.equal(value, saved.weights[name]) for name, value in model_tensors(last).items())
    assert all(torch.equal(value, saved.average[name]) for name, value in model_tensors(average).items())
    assert not torch.equal(last.first.weight, average.first.weight)
    assert not last.training
    assert not last.first.weight.requires_grad
    assert last.again.weight is last.last.weight


def test_the_last_two_are_kept_and_older_ones_load(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["latest", "step-00000002", "step-00000004"]
    assert load_checkpoint(trained / "step-00000002").step == 2


def test_files_can_be_read_by_others(trained: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in find_checkpoint(trained).iterdir()}
    assert len(modes) == 4
    assert len(set(modes.values())) == 1


def test_saving_the_same_step_again_never_leaves_the_folder_without_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(trained)
    first = save_checkpoint(tmp_path, saved)
    second = save_checkpoint(tmp_path, dataclasses.replace(saved, seconds=99.0))
    assert first != second
    assert first.exists()
    assert load_checkpoint(tmp_path).seconds == 99.0
    with pytest.raises(ValueError, match="keep is 0"):
        save_checkpoint(tmp_path, saved, keep=0)


def test_a_refusing_disk_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.step-00000004 cannot be written: "):
        save_checkpoint(tmp_path / "file", load_checkpoint(trained))


FILES = ["model.safetensors", "ema.safetensors", "state.safetensors", "state.json"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


# A changed character of JSON can still be JSON; all other files have a checksum.
DAMAGES = [(file, damage) for file in FILES for damage in (_cut, _empty, Path.unlink)]
DAMAGES += [(file, _flip) for file in FILES if file != "state.json"]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_file_is_named(trained: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(trained, tmp_path / "run")
    path = find_checkpoint(tmp_path / "run") / file
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "run")
    assert str(caught.value).startswith(f"{path} is ")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=file):
        train(build(Toy), pictures(), TrainingConfig(steps=4), out=tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda facts: facts.update(format=9), "format 9, but this pygen reads 2"),
        (lambda facts: facts.pop("format"), "no format number"),
        (lambda facts: facts.pop("step"), "lacks step"),
        (lambda facts: facts.update(checksums={}), "checksum"),
    ],
)
def test_damaged_facts(trained: Path, tmp_path: Path, change: object, says: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    path = find_checkpoint(tmp_path / "run") / "state.json"
    facts = json.loads(path.read_text())
    change(facts)  # type: ignore[operator]
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(tmp_path / "run")


def test_a_missing_folder_or_pointer_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model(tmp_path)
    for content, says in (
        ("step-00000009", "step-00000009 is missing"),
        ("../x", "latest is damaged"),
        ("", "damaged"),
    ):
        (tmp_path / "latest").write_text(content)
        with pytest.raises(CheckpointError, match=says):
            load_model(tmp_path)
    with pytest.raises(CheckpointError, match="none of the families: give a model"):
        load_model(trained)


def test_weights_of_another_model_are_refused(trained: Path) -> None:
    class Longer(Toy):
        def __init__(self, config: object) -> None:
            super().__init__(config)  # type: ignore[arg-type]
            self.extra = torch.nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match=r"the model has extra\.\w+, but .*ema\.safetensors does not"):
        load_model(trained, model=build(Longer))
    other = build(Toy)
    other.first = torch.nn.Linear(7, 6)
    before = other.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r"first\.weight is torch\.float32 \(6, 6\), but expected .*\(6, 7\)"):
        load_model(trained, model=other)
    assert torch.equal(other.norm.weight, before)


def test_no_pickle_is_read_or_written(trained: Path) -> None:
    for path in find_checkpoint(trained).iterdir():
        content = path.read_bytes()
        assert content[:1] != b"\x80"  # a pickle
        assert content[:2] != b"PK"  # a zip, as torch.save makes it
        assert path.suffix in (".safetensors", ".json")


RECIPES = [(family, recipe) for family, recipes in families.FAMILIES.items() for recipe in recipes]


def small(family: str, recipe: str) -> GenerativeModel:
    digits = {"shape": (1, 8, 8), "levels": 17, "classes": 10}
    return families.build(family, recipe, **digits | dict(families.find(family, recipe).changes))


@pytest.mark.parametrize(("family", "recipe"), RECIPES)
def test_every_recipe_comes_back_from_disk(family: str, recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = small(family, recipe)
    assert families.recipe_of(model) == (family, recipe)
    facts = Checkpoint(
        family=family,
        recipe=recipe,
        model_class="",
        config=model.config_dict(),
        step=0,
        seconds=0.0,
        training={},
        data={},
        history=[],
        weights=model_tensors(model),
        average=model_tensors(model),
        optimizers={},
        generators={},
    )
    save_checkpoint(tmp_path, facts)
    state = torch.get_rng_state()
    again = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(model)
    assert again.config == model.config
    assert all(torch.equal(value, model_tensors(model)[key]) for key, value in model_tensors(again).items())


@pytest.mark.parametrize(("family", "recipe"), RECIPES)
def test_no_recipe_keeps_state_that_a_checkpoint_misses(family: str, recipe: str, tmp_path: Path) -> None:
    data = load_data("digits")

    def go(steps: int, out: Path) -> Checkpoint:
        torch.manual_seed(0)
        config = TrainingConfig(steps=steps, batch_size=8, schedule="constant", log_every=1)
        train(small(family, recipe), data, config, out=out, resume=True, progress=False)
        return load_checkpoint(out)

    go(1, tmp_path / "halves")
    halves, whole = go(3, tmp_path / "halves"), go(3, tmp_path / "whole")
    assert difference(halves, whole) is None
    assert difference(halves, load_checkpoint(tmp_path / "halves" / "step-00000001")) is not None


def test_families_by_name() -> None:
    assert families.build("flow", shape=[1, 8, 8]).config.shape == (1, 8, 8)
    with pytest.raises(ValueError, match="'flwo' is no family: did you mean 'flow'"):
        families.build("flwo")
    with pytest.raises(ValueError, match="'level' is no setting of the flow family: did you mean 'levels'"):
        families.build("flow", level=3)
    with pytest.raises(ValueError, match="'realnpv' is no recipe of the flow family: did you mean 'realnvp'"):
        families.build("flow", "realnpv")
    assert families.label("flow") == families.label("flow", "realnvp") == "flow"
    assert families.recipe_of(build(Toy)) is None


def test_a_missing_package_is_one_sentence() -> None:
    with pytest.raises(
        MissingDependency, match=r'^nothing_here is not .* the moon: pip install "pygen-torch\[workbench\]"$'
    ):
        require("nothing_here.at_all", "the moon")
    assert load_data("digits").levels == 17

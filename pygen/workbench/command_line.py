"""The `pygen` command: train, sample, evaluate, compare, info and bench, each with a `--help` of its own.

What the user gets wrong (a path, a file, a value, a name) ends with one sentence on stderr and exit code 2. Nothing
heavy is imported before the command is known.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pygen.workbench import MissingDependency, require
from pygen.workbench.families import FAMILIES, label, resolve

if TYPE_CHECKING:
    import torch

    from pygen.model import GenerativeModel

Family = Literal["gan", "vae", "flow", "diffusion", "autoregressive"]
FAMILY_NAMES: tuple[Family, ...] = typing.get_args(Family)
Options = TypeVar("Options")

USAGE = """usage: pygen COMMAND [OPTIONS]

Five families of generative models on compiled kernels.

commands:
  compare                 train all five on the same data and write a report
  train FAMILY            train one: gan, vae, flow, diffusion or autoregressive
  sample CHECKPOINT       draw pictures from a trained model
  evaluate CHECKPOINT     measure a trained model against held-out data
  info                    versions, libraries, and which operators are native
  bench                   time the kernels against their rivals

examples:
  pygen compare --data digits --out runs/compare
  pygen train diffusion --data digits --out runs/diffusion --steps 2000
  pygen train flow --recipe glow --out runs/glow
  pygen sample runs/diffusion --count 64 --out grid.png

Each command explains its options: pygen COMMAND --help
"""

BENCH_USAGE = """usage: pygen bench [ARGUMENTS]

Time each kernel, turn by turn, against what one would otherwise run. Every argument
goes to benchmarks/run.py of the source checkout; `pygen bench --help` shows its options.
"""


class UserError(Exception):
    """What the user can mend; the message is one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Train the families on the same data and compare them.

    Each family trains on the same 80 % of the data for a fixed number of steps, and is held against the other 20 %.
    The folder gets report.html, summary.json, the figures and one checkpoint per family. The same seed gives the same
    numbers, times apart.
    """

    data: str = "digits"
    """What to train on: digits, photographs, a folder of images, or an IDX or NPZ file."""
    out: Path = Path("runs/compare")
    """Folder for the report and everything beside it; the checkpoints of an earlier comparison in it are replaced."""
    families: tuple[Family, ...] = FAMILY_NAMES
    """Which families, by name."""
    size: int | None = None
    """For a folder of images: scale and crop each to this many pixels square."""
    budget: Literal["quick", "full"] = "quick"
    """How long to train: quick is some minutes in all on two cores; full is several times that."""
    seed: int = 0
    """Seed of weights, batches and samples."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw pictures from a trained model.

    Sample number i under a seed is the same picture however many are drawn with it. A class-conditional model takes
    its classes in turn unless --label says which.
    """

    checkpoint: Annotated[Path, "positional"]
    """Folder that training wrote."""
    count: int = 64
    """How many pictures."""
    out: Path = Path("grid.png")
    """A .png file for a grid of them, or .npz for the grey values (key pictures) and classes (key labels)."""
    label: int | None = None
    """Draw this class only."""
    seed: int = 0
    """Seed of the samples."""
    steps: int | None = None
    """Network passes to spend, where the family can choose (diffusion)."""
    columns: int | None = None
    """Pictures in one row of the grid; by default as many as make it square, or one for each class."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a trained model against held-out data.

    Prints bits per dimension, Frechet distance, precision, recall, class coverage and the cost of 100 samples, with
    real pictures as the row to beat and noise as the row that must lose.
    """

    checkpoint: Annotated[Path, "positional"]
    """Folder that training wrote."""
    data: str | None = None
    """Other data than the model was trained on; the held-out fifth of either is used."""
    size: int | None = None
    """For --data that is a folder of images: scale and crop each to this many pixels square; by default to the size
    that the model makes."""
    steps: int | None = None
    """Network passes to spend on each sample, where the family can choose (diffusion)."""
    seed: int = 0
    """Seed of the samples and of the judging classifier."""
    json: bool = False
    """Print JSON instead of a table."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Say what this installation is and can do on this machine.

    Versions, the libraries that loaded, the instruction set in use, the CUDA architectures compiled, and for each
    operator whether it is native here, and if not, why.
    """

    json: bool = False
    """Print JSON instead of text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for what the user can mend, or that of a benchmark."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    if given[0] == "--version":
        import pygen

        print(f"pygen {pygen.__version__}")
        return 0
    try:
        command = _known(given[0], COMMANDS, "command")
        return COMMANDS[command](given[1:])
    except (UserError, MissingDependency, ValueError, OSError) as error:
        print(f"pygen: {_sentence(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        said = _of_the_run(error)
        if said is None:
            raise
        print(f"pygen: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npygen: stopped", file=sys.stderr)
        return 130


def _compare(arguments: list[str]) -> int:
    if any(argument.partition("=")[0] == "--family" for argument in arguments):
        raise UserError("there is no option --family: did you mean --families?")
    options = _parse(_compare_options(), "compare", arguments)
    if not options.families:
        raise UserError(f"--families is empty, but expected some of {', '.join(FAMILY_NAMES)}")
    chosen = {family: _known_recipe(family, getattr(options, family)) for family in _with_recipes()}
    for family, recipe in chosen.items():
        if family not in options.families and recipe != resolve(family):
            raise UserError(f"--{family} is {recipe}, but --families has no {family}")
    from pygen.workbench.comparison import compare
    from pygen.workbench.data import load_data

    compare(
        data=load_data(options.data, size=options.size),
        out=options.out,
        families=list(dict.fromkeys(options.families)),
        recipes=chosen,
        budget=options.budget,
        seed=options.seed,
        device=_device(options.device),
    )
    return 0


def _train(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: pygen train FAMILY [OPTIONS]\n\nFAMILY is one of {', '.join(FAMILY_NAMES)}.\n"
            "Each has its own options: pygen train FAMILY --help",
            file=sys.stdout if arguments else sys.stderr,
        )
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        named = next((argument for argument in arguments if argument in FAMILY_NAMES), "FAMILY")
        raise UserError(f"{arguments[0]} stands before the family, but expected pygen train {named} [OPTIONS]")
    family = _known(arguments[0], FAMILY_NAMES, "family")
    from pygen.workbench import recipes
    from pygen.workbench.checkpoint import has_checkpoint
    from pygen.workbench.data import load_data

    recipe = _recipe(family, arguments[1:])
    options = _parse(_train_options(family, recipe), f"train {family}", arguments[1:])
    train, _ = load_data(options.data, size=options.size).split()
    if options.resume and not has_checkpoint(options.out):
        _say(f"{options.out} holds no checkpoint to resume: training starts at the first step")
    recipes.train_family(
        family,
        train,
        recipe=recipe,
        out=options.out,
        training=options.training,
        model={field.name: getattr(options.model, field.name) for field in dataclasses.fields(options.model)},
        resume=options.resume,
        device=_device(options.device),
        tensorboard=options.tensorboard,
    )
    print(options.out)
    return 0


def _sample(arguments: list[str]) -> int:
    options = _parse(Sample, "sample", arguments)
    if options.count < 1:
        raise UserError(f"--count is {options.count}, but expected at least 1")
    if options.columns is not None and options.columns < 1:
        raise UserError(f"--columns is {options.columns}, but expected at least 1")
    if options.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out is {options.out}, but expected a name that ends in .png or .npz")
    model = _load(options.checkpoint, options.device)
    classes = model.config.classes
    if options.label is not None and not (classes is not None and 0 <= options.label < classes):
        known = "a model without classes" if classes is None else f"0 .. {classes - 1}"
        raise UserError(f"--label is {options.label}, but the checkpoint has {known}")
    import torch

    from pygen.workbench.evaluation import draw

    numbers = torch.arange(options.count)
    labels = None
    if classes is not None:
        labels = numbers % classes if options.label is None else torch.full_like(numbers, options.label)
    pictures = draw(model, numbers, labels, seed=options.seed, steps=options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.suffix == ".npz":
        import numpy as np

        arrays: dict[str, Any] = {"pictures": model.quantize(pictures).numpy().astype(np.uint8)}
        arrays["levels"] = np.asarray(model.config.levels)
        if labels is not None:
            arrays["labels"] = labels.numpy()
        np.savez(options.out, **arrays)
    else:
        from pygen.workbench.figures import is_ink, sheet_png

        square = max(1, round(options.count**0.5))
        turns = classes if classes is not None and options.label is None and classes <= 16 else square
        columns = min(options.columns or turns, options.count)
        options.out.write_bytes(sheet_png(pictures, columns, ink=is_ink(pictures)))
    print(options.out)
    return 0


def _evaluate(arguments: list[str]) -> int:
    options = _parse(Evaluate, "evaluate", arguments)
    if options.size is not None and options.data is None:
        raise UserError(f"--size is {options.size}, but expected --data with it: the model's own data has its size")
    model = _load(options.checkpoint, options.device)
    import torch

    from pygen.workbench.checkpoint import load_checkpoint
    from pygen.workbench.data import is_picture_folder, load_data, reload_data
    from pygen.workbench.evaluation import Judge, check_fit, draw, evaluate
    from pygen.workbench.report import terminal_table

    facts = load_checkpoint(options.checkpoint).data
    if options.data is None:
        train, test = (reload_data(dict(facts["origin"]), part=part) for part in ("train", "test"))
    else:
        _, height, width = model.config.shape
        own = height if height == width and is_picture_folder(options.data) else None
        train, test = load_data(options.data, size=own if options.size is None else options.size).split()
    # What does not fit is found before the judge trains.
    check_fit(model, train, facts.get("class_names", ()))
    if options.steps is not None:
        draw(model, torch.arange(1), seed=options.seed, steps=options.steps)
    judge = Judge(train, test, seed=options.seed, say=_say)
    _say(f"drawing and judging {judge.count} samples of {type(model).__name__}")
    result, _ = evaluate(model, judge, seed=options.seed, steps=options.steps)
    rows = {type(model).__name__: dataclasses.asdict(result)}
    rows |= {
        "real": dataclasses.asdict(judge.score(judge.real)),
        "noise": dataclasses.asdict(judge.score(judge.noise())),
    }
    print(json.dumps(rows, indent=2) if options.json else terminal_table(rows))
    return 0


def _info(arguments: list[str]) -> int:
    options = _parse(Info, "info", arguments)
    from pygen.workbench import information

    facts = information.facts()
    print(json.dumps(facts, indent=2) if options.json else information.text(facts))
    return 0


def _bench(arguments: list[str]) -> int:
    package = importlib.util.find_spec("pygen")
    folders = [Path.cwd()]
    if package is not None and package.submodule_search_locations:
        folders += [Path(folder).parent for folder in package.submodule_search_locations]
    script = next((found for folder in folders if (found := folder / "benchmarks" / "run.py").is_file()), None)
    if script is None:
        if arguments in (["-h"], ["--help"]):
            print(BENCH_USAGE, end="")
            return 0
        raise UserError("benchmarks/run.py is not in an installed package: run this from a source checkout of pygen")
    return subprocess.run([sys.executable, str(script), *arguments], check=False).returncode


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": _compare,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "info": _info,
    "bench": _bench,
}


def _say(text: str) -> None:
    """A line on stderr: stdout is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def _known(name: str, names: Any, what: str) -> Any:
    """The name, or a UserError that suggests the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, list(names), n=1)
    suggestion = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
    raise UserError(f"there is no {what} {name!r}: {suggestion}")


def _parse(options: Callable[..., Options], command: str, arguments: list[str]) -> Options:
    tyro = require("tyro", "the command line")
    width = min(shutil.get_terminal_size().columns, 100)
    # tyro joins lines unless they start with a space.
    wrapper = textwrap.TextWrapper(width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    paragraphs = inspect.cleandoc(options.__doc__ or "").split("\n\n")
    parsed: Options = tyro.cli(
        _positional(options),
        prog=f"pygen {command}",
        args=arguments,
        description="\n".join(wrapper.fill(" ".join(paragraph.split())) for paragraph in paragraphs),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return parsed


def _positional(options: Any) -> Any:
    """The option class with its fields marked "positional" marked as tyro marks them, which is not imported earlier."""
    import tyro

    for name, hint in typing.get_type_hints(options, include_extras=True).items():
        if "positional" in getattr(hint, "__metadata__", ()):
            kind = typing.get_args(hint)[0]
            options.__annotations__[name] = Annotated[kind, tyro.conf.Positional, tyro.conf.arg(metavar=name.upper())]
    return options


def _with_recipes() -> list[str]:
    """The families that have more than one recipe."""
    return [family for family, recipes in FAMILIES.items() if len(recipes) > 1]


def _known_recipe(family: str, name: str) -> str:
    known: str = _known(name, FAMILIES[family], f"{family} recipe")
    return known


def _recipe(family: Family, arguments: list[str]) -> str:
    """The recipe that the arguments name: it decides what other options there are."""
    if family in _with_recipes():
        for position, argument in reversed(list(enumerate(arguments))):
            option, equals, value = argument.partition("=")
            if option == "--recipe":
                return _known_recipe(family, value if equals else "".join(arguments[position + 1 : position + 2]))
    return resolve(family)


def _compare_options() -> Any:
    """`Compare`, with an option for each family that has several recipes."""
    require("tyro", "the command line")
    import tyro

    fields = [
        (family, Annotated[str, tyro.conf.arg(help=f"Recipe of the {family} family: {_or(FAMILIES[family])}.")], first)
        for family, first in ((family, resolve(family)) for family in _with_recipes())
    ]
    options = dataclasses.make_dataclass("Compare", fields, bases=(Compare,), frozen=True, kw_only=True)
    options.__doc__ = Compare.__doc__
    return options


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


def _train_options(family: Family, recipe: str) -> Any:
    """The options of `pygen train FAMILY`: a recipe of the family as defaults, its model under --model."""
    import tyro

    from pygen.model import ModelConfig
    from pygen.workbench.families import config_class

    config = config_class(family, recipe)
    found = FAMILIES[family][recipe]
    of_the_data = {field.name for field in dataclasses.fields(ModelConfig)}
    described: dict[str, str] = {}
    for each in reversed(config.__mro__):
        described |= _described(each.__doc__ or "", [field.name for field in dataclasses.fields(config)])
    hints = typing.get_type_hints(config)
    model_fields = [
        (
            field.name,
            Annotated[hints[field.name], tyro.conf.arg(help=described.get(field.name, ""))],
            found.changes.get(field.name, field.default),
        )
        for field in dataclasses.fields(config)
        if field.name not in of_the_data
    ]
    model = dataclasses.make_dataclass("Model", model_fields, frozen=True, kw_only=True)
    model.__doc__ = (config.__doc__ or "").strip().split("\n")[0]
    training = dataclasses.replace(found.training, checkpoint_every=1000)

    def option(kind: Any, text: str) -> Any:
        return Annotated[kind, tyro.conf.arg(help=text)]

    fields: list[tuple[str, Any, Any]] = [
        (
            "data",
            option(str, "What to train on: digits, photographs, a folder of images, or an IDX or NPZ file."),
            "digits",
        ),
        ("size", option(int | None, "For a folder of images: scale and crop each to this many pixels square."), None),
        ("out", option(Path, "Folder for checkpoints."), Path("runs") / label(family, recipe).replace(" ", "-")),
        ("resume", option(bool, "Go on from the last checkpoint in the folder, bit for bit."), False),
        ("tensorboard", option(bool, "Also write the losses to the folder's tensorboard."), False),
        ("device", option(str, "cpu, cuda, or auto: cuda where there is one."), "auto"),
        ("training", Annotated[type(training), tyro.conf.arg(name="")], training),
        ("model", model, model()),
    ]
    if family in _with_recipes():
        text = f"Which model: {_or(FAMILIES[family])}. The defaults and the options under --model are its own."
        fields.insert(0, ("recipe", option(str, text), recipe))
    train = dataclasses.make_dataclass("Train", fields, frozen=True, kw_only=True)
    train.__doc__ = (
        f"Train a model of the family {family}.\n\nThe defaults are those of `pygen compare`. The folder gets "
        "checkpoints that `pygen sample` and `pygen evaluate` read."
    )
    return train


def _described(text: str, names: list[str]) -> dict[str, str]:
    """What a docstring of "name: meaning." or "name, name: meaning." entries says of each name."""
    known = "|".join(map(re.escape, names))
    heading = re.compile(rf"(?:(?<=\s)|^)((?:{known})(?:, (?:{known}))*): ")
    parts = heading.split(" ".join(text.split()))
    return {name: parts[i + 1].strip() for i in range(1, len(parts), 2) for name in parts[i].split(", ")}


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UserError(f"--device is {name}, but expected cpu, cuda or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device is {name}, but PyTorch sees no CUDA device")
    return torch.device(name)


def _load(checkpoint: Path, device: str) -> GenerativeModel:
    chosen = _device(device)
    from pygen.workbench.checkpoint import load_model

    return load_model(checkpoint, ema=True).to(chosen).eval()


def _of_the_run(error: RuntimeError | MemoryError) -> str | None:
    """The sentence for what went wrong in training or sampling and the user can mend, or None for any other error."""
    run, torch = sys.modules.get("pygen.workbench.run"), sys.modules.get("torch")
    text = _sentence(error)
    if run is not None and isinstance(error, run.TrainingDiverged):
        return text
    # PyTorch has a class of its own for a full GPU, but not for full main memory.
    full = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if full or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "the memory of the device is full: try smaller pictures, a smaller model or a smaller batch"
    # What the autoregressive model says of weights that it cannot sample from.
    return text if text.endswith("the parameters are not finite") else None


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())

"""Trains a toy in child processes, kills each with SIGKILL at another moment, resumes it, and compares bit for bit.

    python crash.py sweep FOLDER KIND      kill before every call that changes the disk, and within some steps
    python crash.py train FOLDER KIND      train until killed, resuming if there is a checkpoint

`sweep` prints how many kills it survived. Children are forks of a process that has run no threads, to start quickly.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from toys import Duel, Toy, build, pictures

from pygen.workbench import checkpoint, run
from pygen.workbench.checkpoint import Checkpoint, load_checkpoint
from pygen.workbench.training import TrainingConfig, train

CONFIG = TrainingConfig(
    steps=7, batch_size=7, checkpoint_every=3, log_every=2, warmup=2, weight_decay=0.1, ema_images=20, seed=5
)
KINDS = {"toy": Toy, "duel": Duel}
_TENSORS = ("weights", "average", "optimizers", "generators")


def train_toy(folder: Path, kind: str) -> None:
    train(build(KINDS[kind]), pictures(), CONFIG, out=folder, resume=True, progress=False)


def in_child(work: Callable[[], None]) -> int:
    """The wait status of a child that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killing_before(calls: list[tuple[Any, str]], number: int, work: Callable[[], None]) -> None:
    """Do `work`, and die by SIGKILL before call `number` to any of the given functions."""
    count = 0

    def armed(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*arguments, **named)

        return wrapped

    for place, name in calls:
        setattr(place, name, armed(getattr(place, name)))
    work()


def half_written(path: Path, content: bytes) -> int:
    """Path.write_bytes as a kill in its middle leaves it: the first half first, the rest by a second call."""
    half = len(content) // 2
    with path.open("wb") as file:
        file.write(content[:half])
        file.flush()
        os.fsync(file.fileno())
        file.write(content[half:])
    return len(content)


def difference(one: Checkpoint, other: Checkpoint) -> str | None:
    for group in _TENSORS:
        a, b = getattr(one, group), getattr(other, group)
        if a.keys() != b.keys():
            return f"{group}: {a.keys() ^ b.keys()}"
        for name in a:
            if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name]):
                return f"{group}: {name}"
    without_times = [[{**record, "seconds": 0} for record in each.history] for each in (one, other)]
    return None if without_times[0] == without_times[1] else "history"


def sweep(folder: Path, kind: str) -> None:
    disk = [(os, "fsync"), (os, "replace"), (pathlib.Path, "rename"), (pathlib.Path, "mkdir"), (shutil, "rmtree")]
    steps = [(run.Run, "_train_step"), (run, "average_into")]
    train_toy(folder / "whole", kind)  # here and not in a child, so that the children find PyTorch warmed up
    whole = load_checkpoint(folder / "whole")
    checkpoint.Path.write_bytes = half_written  # type: ignore[method-assign]
    # A killed process leaves the page cache as it was, so the test need not wait for the disk.
    os.fsync = lambda _: None  # type: ignore[assignment]
    kills = 0
    for what, calls in {"disk": disk, "step": steps}.items():
        for number in range(10_000):
            cut = folder / f"{what}{number}"
            status = in_child(partial(killing_before, calls, number, partial(train_toy, cut, kind)))
            if status == 0:
                break
            assert os.WIFSIGNALED(status), f"the run stopped by itself at {what} call {number}"
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
            for kept in cut.glob("step-*"):
                load_checkpoint(kept)
            assert not in_child(partial(train_toy, cut, kind)), f"no resuming after a kill at {what} call {number}"
            found = difference(load_checkpoint(cut), whole)
            assert found is None, f"killed at {what} call {number}, resumed, and differs in {found}"
            left = sorted(path.name for path in cut.iterdir())
            assert all(name.startswith(("step-", "latest")) for name in left), left
            shutil.rmtree(cut)
    print(kills)


def train_slowly(folder: Path, kind: str) -> None:
    original = run.Run._train_step

    def slow(self: run.Run) -> torch.Tensor:
        print(self.step, flush=True)
        time.sleep(0.02)
        return original(self)

    run.Run._train_step = slow  # type: ignore[method-assign]
    train_toy(folder, kind)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"sweep": sweep, "train": train_slowly}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])

"""The progress line of a training run: step, rates, time left and losses, on stderr."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple, TextIO


class Progress(NamedTuple):
    """How far a run is."""

    label: str
    step: int
    steps: int
    steps_per_second: float  # of this process; 0 before its first step
    pictures_per_second: float
    seconds_left: float
    losses: Mapping[str, float]  # by player, mean since the last record; empty before the first step

    def __str__(self) -> str:
        parts = [self.label] if self.label else []
        parts.append(f"{self.step:>{len(str(self.steps))}}/{self.steps} {self.step / self.steps:4.0%}")
        if self.steps_per_second > 0:
            parts.append(f"{self.steps_per_second:.3g} steps/s")
            parts.append(f"{self.pictures_per_second:,.0f} pictures/s")
            parts.append(f"{duration(self.seconds_left)} left")
        parts += [f"{'loss' if player == 'model' else player} {loss:.4g}" for player, loss in self.losses.items()]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 42s, 3m07s, 5h02m, 2d04h."""
    whole = round(seconds)
    for big, small, name, next_name in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= big:
            return f"{whole // big}{name}{whole % big // small:02d}{next_name}"
    return f"{whole}s"


class Reporter:
    """Calls `show` now and then with how far a run is: every 0.2 s where a line is updated in place, else every 5 s.

    target: True for a line on stderr, a function to be called with each Progress instead, or False for silence.
    """

    def __init__(
        self,
        target: bool | Callable[[Progress], None],
        label: str,
        steps: int,
        batch: int,
        *,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._in_place = target is True and self._stream.isatty()
        self._show = self._print if target is True else target or None
        self._label, self._steps, self._batch = label, steps, batch
        self._every = 0.2 if self._in_place or target is not True else 5.0
        self._start = self._shown = time.monotonic()
        self._first_step: int | None = None
        self._open = False

    def due(self) -> bool:
        """Whether it is time to report; asked every step, because the losses may have to be fetched for it."""
        return self._show is not None and time.monotonic() - self._shown >= self._every

    def start(self, step: int) -> None:
        """Begin to count time at `step`."""
        self._first_step = step
        self._start = self._shown = time.monotonic()

    def report(self, step: int, losses: Mapping[str, float]) -> None:
        """Show now."""
        if self._show is None:
            return
        self._shown = time.monotonic()
        done = step - (step if self._first_step is None else self._first_step)
        rate = done / max(self._shown - self._start, 1e-9)
        left = (self._steps - step) / rate if rate else 0.0
        self._show(Progress(self._label, step, self._steps, rate, rate * self._batch, left, losses))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # So that whatever comes next, an error too, starts on a line of its own.
        if self._open:
            self._stream.write("\n")
            self._stream.flush()

    def _print(self, progress: Progress) -> None:
        text = str(progress)
        if self._in_place:
            # A line that wraps could not be written over.
            text = f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        else:
            text += "\n"
        self._stream.write(text)
        self._stream.flush()
        self._open = self._in_place

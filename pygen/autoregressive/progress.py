"""How far a long sampling is: a line on stderr, or a call of the user's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

Target = bool | Callable[[int, int], None]
"""True for a line on stderr, False for silence, or a function called with how many tokens are done, of how many."""


class Progress:
    """Says, at most every 0.2 s (5 s where the line cannot be updated in place), how many of `total` tokens are done.

    A function as target is called for every report of the sampling. Used as a context, it ends its line.
    """

    def __init__(self, target: Target, total: int, *, stream: TextIO | None = None) -> None:
        self._target = target
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._in_place = target is True and self._stream.isatty()
        self._start = self._shown = time.monotonic()
        self._open = False

    def __call__(self, done: int) -> None:
        """`done` tokens of each sample are drawn."""
        if self._target is True:
            self._print(done)
        elif callable(self._target):
            self._target(done, self._total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._stream.write("\n")
            self._stream.flush()

    def _print(self, done: int) -> None:
        now = time.monotonic()
        if done < self._total and now - self._shown < (0.2 if self._in_place else 5.0):
            return
        self._shown = now
        taken = now - self._start
        left = taken / done * (self._total - done) if done else 0.0
        text = f"{done}/{self._total} tokens {done / max(self._total, 1):4.0%}  {taken:.1f} s, {left:.1f} s left"
        self._stream.write(f"\r{text}\x1b[K" if self._in_place else f"{text}\n")
        self._stream.flush()
        self._open = self._in_place

"""How a benchmark case is described and timed: turn by turn with its rivals in one process.

A family's file, such as coupling.py, has `cases(device)`; run.py finds it by its name in FAMILIES.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], Any]


@dataclasses.dataclass
class Case:
    """One operation on one shape.

    rivals: name -> the same work done another way; each is run once before it is timed.
    floor_bytes: the fewest bytes the operation must move, each input read and each output written once.
    targets: rival -> the ratio rival time / our time that is aimed at; "call" -> most microseconds of our time.
    peak: where memory counts, what gives the bytes that a contender's work needs at its highest, see `peak_bytes`.
    peak_targets: rival -> the ratio of its bytes to ours that is aimed at.
    """

    name: str
    shape: str
    ours: Work
    rivals: dict[str, Work]
    floor_bytes: int | None = None
    targets: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    peak: Callable[[Work], int] | None = None
    peak_targets: dict[str, float] = dataclasses.field(default_factory=dict)


def compiled(function: Any, backend: Any = "inductor") -> Any:
    """`function` compiled for the static shapes of one case.

    The compiler keeps its graphs by code object: one that cases share would turn to graphs of dynamic shape, and past
    the recompile limit to eager PyTorch.
    """
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    return torch.compile(own, dynamic=False, backend=backend)


def seconds(work: Work, repeats: int, device: torch.device) -> float:
    """Seconds per call, over `repeats` calls."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most bytes of tensors that were there at a time beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes), default=0)


def measure(case: Case, device: torch.device, *, rounds: int, slice_seconds: float = 0.01) -> dict[str, Any]:
    """Median seconds per call of a case and its rivals, taken in turn so that a noisy moment hits them all."""
    contenders = {"ours": case.ours, **case.rivals}
    repeats = {}
    with torch.no_grad() if "backward" not in case.name else torch.enable_grad():
        for name, work in contenders.items():
            for _ in range(3):
                work()
            repeats[name] = max(1, min(10_000, int(slice_seconds / max(seconds(work, 1, device), 1e-7))))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, work in contenders.items():
                times[name].append(seconds(work, repeats[name], device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: (max(values) - min(values)) / medians[name] for name, values in times.items()}
    peaks = {} if case.peak is None else {name: case.peak(work) for name, work in contenders.items()}
    return {
        "name": case.name,
        "shape": case.shape,
        "seconds": medians,
        "spread": spread,
        "ratios": {name: medians[name] / medians["ours"] for name in case.rivals},
        "floor_bytes": case.floor_bytes,
        "targets": case.targets,
        "note": case.note,
        **({"peak_bytes": peaks, "peak_targets": case.peak_targets} if peaks else {}),
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read plus written: the roof of everything that moves memory."""
    elements = (1 << 30 if device.type == "cuda" else 1 << 27) // 4
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source), 1, device) for _ in range(9))
    return 2 * 4 * elements / best

"""Runs the benchmarks: each case turn by turn with its rivals, medians, ratios, and the share of the floor.

For example:

    python benchmarks/run.py                       # every family on the CPU
    python benchmarks/run.py --family coupling --rounds 31
    python benchmarks/run.py --device cuda --out benchmarks/results
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAMILIES = (
    "coupling", "spline", "piecewise", "mixture", "masked", "flows_small", "memory", "compat", "schedule", "noise",
    "cache", "sampling", "logistics", "incremental", "tarflow", "compat_zuko", "generate",
)  # fmt: skip

# glibc hands fresh pages to every large output, and their faults would hide the kernels; see --process.
STEADY = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family (may be repeated)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="PyTorch's threads; its default when left out")
    parser.add_argument("--rounds", type=int, default=21, help="turns that each contender gets (default 21)")
    parser.add_argument(
        "--process", default="steady", choices=("steady", "default"),
        help="steady keeps freed memory in the process and lets waiting threads sleep, for all contenders alike; "
        "default is a user's process, in which page faults of large outputs dominate",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path,
        help="folder to write <machine>-<date>.json into; of a file that is there, the other families' cases stay",
    )  # fmt: skip
    return parser.parse_args(arguments)


def machine(device: str) -> dict[str, Any]:
    """Name and size of the machine, so that a result can be read later."""
    import torch

    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    cpu = names[0] if names else platform.processor()
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {os.cpu_count()} cores",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    options = parse()
    wanted = STEADY if options.process == "steady" else {}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # The allocator and the thread pool read these once, at start.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})

    import torch
    from measure import copy_bandwidth, measure

    from pygen import _native

    why = _native._absent.get(options.device, "")
    if not why and options.device == "cuda":
        why = _native._why_not_device(None)
    if why:
        print(f"benchmarks: no {options.device} kernels: {why}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    host = machine(options.device)
    bandwidth = copy_bandwidth(device)
    print(f"{host['name']}, torch {host['torch']}, {host['threads']} threads, {options.process} process")
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read + written)\n")
    print(f"{'case':36} {'shape':22} {'ours':>11}  {'rival':>26} {'ratio':>8} {'target':>8}  floor")
    path, commit = None, revision()
    results: list[dict[str, Any]] = []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        slug = "-".join("".join(c if c.isalnum() else " " for c in host["name"].lower()).split())
        path = options.out / f"{slug}-{datetime.date.today().isoformat()}.json"
        results = others(path, options.family or FAMILIES)
    for family in options.family or FAMILIES:
        for case in importlib.import_module(family).cases(device):
            result = measure(case, device, rounds=options.rounds)
            result |= {
                "family": family, "commit": commit, "copy_bandwidth": bandwidth, "process": options.process
            }  # fmt: skip
            if case.floor_bytes:
                result["floor_share"] = case.floor_bytes / bandwidth / result["seconds"]["ours"]
            results.append(result)
            show(result)
            if path:  # after each, as the next may take minutes
                write(path, host, results)
    if path:
        print(f"\nwrote {path}")
    return 0


def write(path: Path, host: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The cases in the order of their families."""
    ordered = sorted(results, key=lambda case: FAMILIES.index(case["family"]))
    record = {"machine": host, "date": datetime.date.today().isoformat(), "cases": ordered}
    path.write_text(json.dumps(record, indent=1) + "\n")


def others(path: Path, families: Sequence[str]) -> list[dict[str, Any]]:
    """The cases of other families that a file of this machine and day has already."""
    if not path.exists():
        return []
    return [case for case in json.loads(path.read_text())["cases"] if case["family"] not in families]


def revision() -> str | None:
    """The commit of the checkout, where this is one."""
    here = Path(__file__).parent
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return answer.stdout.strip() or None


def show(result: dict[str, Any]) -> None:
    """One line per rival."""
    ours = result["seconds"]["ours"]
    floor = f"{result['floor_share']:6.0%}" if "floor_share" in result else ""
    call = result["targets"].get("call")
    first = f"{result['name']:36} {result['shape']:22} {duration(ours):>11}"
    if not result["ratios"]:
        print(f"{first}  {result['note']}  {floor}")
    for rival, ratio in result["ratios"].items():
        target = result["targets"].get(rival)
        aim = "" if target is None else f"{target:.1f}x"
        print(f"{first}  {rival + ' ' + duration(result['seconds'][rival]):>26} {ratio:7.2f}x {aim:>8} {floor}")
        first, floor = f"{'':36} {'':22} {'':>11}", ""
    if "peak_bytes" in result:
        print(f"{'':36} {'':22} {'':>11}  {memory(result)}")
    if call is not None:
        print(f"{'':36} {'':22} {'':>11}  a call: at most {call:g} us")
    sys.stdout.flush()


def memory(result: dict[str, Any]) -> str:
    """Peak memory of all contenders, with the ratio to ours, and the ratio that is aimed at."""
    peaks = dict(result["peak_bytes"])
    ours = peaks.pop("ours")
    texts = [f"at its peak {ours / 1e6:.1f} MB"]
    for rival, peak in peaks.items():
        aim = f", aim {result['peak_targets'][rival]:g}x" if rival in result["peak_targets"] else ""
        texts.append(f"{rival} {peak / 1e6:.1f} MB ({peak / ours:.1f}x{aim})")
    return "; ".join(texts)


def duration(seconds: float) -> str:
    """Seconds in a unit that shows three digits."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


if __name__ == "__main__":
    sys.exit(main())

"""What this installation is and can do on this machine: versions, libraries loaded, and each operator's kernels."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from typing import Any


def facts() -> dict[str, Any]:
    """Versions, libraries, instruction set, CUDA architectures and operators, as plain values for JSON."""
    import numpy
    import torch

    import pygen
    from pygen import _native

    report = dict(_native.report())
    versions = {
        "pygen": pygen.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        **report.pop("versions", {}),
    }
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"versions": versions, "machine": machine, **report}


def processor_name() -> str:
    """The processor's model, as the operating system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def text(facts: Mapping[str, Any]) -> str:
    """The facts as paragraphs for a terminal: operators as a table, with each reason for a reference given once."""
    paragraphs = [
        "\n".join([name, *_lines(value, 2)]) for name, value in facts.items() if name != "operators" and value
    ]
    operators: Mapping[str, Any] = facts.get("operators", {})
    if operators:
        width = max(len(name) for name in operators)
        devices = list(next(iter(operators.values())))
        lines = [f"{'operators':<{width + 4}}" + "".join(f"{device:<12}" for device in devices).rstrip()]
        reasons: dict[str, list[str]] = {}
        for name, states in operators.items():
            cells = "".join(f"{'native' if states[device]['native'] else 'reference':<12}" for device in devices)
            lines.append(f"  {name:<{width + 2}}{cells}".rstrip())
            for device, state in states.items():
                if not state["native"]:
                    reasons.setdefault(f"{device}: {state['why']}", []).append(name)
        for reason, names in reasons.items():
            which = "every operator" if len(names) == len(operators) else ", ".join(names)
            lines.append(f"  {which} on {reason}")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def _lines(value: Any, indent: int) -> list[str]:
    pad = " " * indent
    if not isinstance(value, Mapping):
        return [pad + _plain(value)]
    lines = []
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            lines += [f"{pad}{key}", *_lines(entry, indent + 2)]
        else:
            lines.append(f"{pad}{key + ' ':<{20 - indent}} {_plain(entry)}")
    return lines


def _plain(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, (list, tuple, Mapping)) and not value):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(entry) for entry in value)
    return str(value)


def library_versions(*names: str) -> dict[str, str]:
    """The versions of those of the named modules that are loaded."""
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules}

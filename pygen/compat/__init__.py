"""Drop-ins: models written for another library run on pygen's kernels.

`pygen.compat.<library>.convert(model)` changes the layers of one live model, `pygen.compat.<library>.patch()` those of
the whole process; both return a `Handle` that lists what was replaced and takes it back.
"""

from __future__ import annotations

import importlib
from typing import Any

_LIBRARIES = ("nflows", "normflows", "transformers", "zuko")

__all__ = [*_LIBRARIES]


def require(library: str) -> None:
    """Raise ModuleNotFoundError, naming the extra to install, where the library of a drop-in is missing."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(
            f"pygen.compat.{library} needs {library}, which is not installed: pip install 'pygen-torch[{library}]'",
            name=library,
        ) from None


def __getattr__(name: str) -> Any:
    if name in _LIBRARIES:
        return importlib.import_module(f"pygen.compat.{name}")
    raise AttributeError(f"module 'pygen.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

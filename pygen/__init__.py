"""pygen: the compiled backend of generative modelling in PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = ("autoregressive", "compat", "diffusion", "flows", "gan", "model", "nn", "ops", "vae", "workbench")

__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    # Subpackages load on first use, so that `import pygen` costs next to nothing on top of torch.
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pygen.{name}")
    raise AttributeError(f"module 'pygen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

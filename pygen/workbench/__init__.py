"""The workbench: data, training, checkpoints, judgement and the command line, written once for all families."""

from __future__ import annotations

import importlib
from types import ModuleType

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


class MissingDependency(ImportError):
    """An optional package is not installed; the message says what needs it and how to get it."""


def require(module: str, purpose: str, *, install: str = '"pygen-torch[workbench]"') -> ModuleType:
    """Import an optional package, such as `require("sklearn.datasets", "the digits")`.

    Raises MissingDependency where it is not installed; an installed package that fails to import raises its own error.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingDependency(
            f"{_DISTRIBUTIONS.get(package, package)} is not installed, but needed for {purpose}: pip install {install}",
            name=package,
        ) from None

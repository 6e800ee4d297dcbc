"""Classes that stand in for those of live modules: subclasses with other methods and nothing of their own.

A class is served where its `forward` is, instruction by instruction, one that is known: transformers repeats the same
code in the files of some hundred models.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class Swapped:
    """First base of a stand-in, which is made for each class. It is copied and pickled as one of that class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, cls = type(self).__bases__
        return _blank, (mixin, cls), vars(self)


def swapped(mixin: Any, cls: Any) -> type:
    """The class `cls` with the methods of `mixin` before its own, under its own name, which its library goes by."""
    return _make(mixin, cls)


@functools.cache
def _make(mixin: Any, cls: Any) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), names)


def _blank(mixin: type, cls: type) -> Any:
    return object.__new__(swapped(mixin, cls))


@functools.cache
def same_code(function: Callable[..., Any], *known: Callable[..., Any]) -> bool:
    """Whether a function is one of those that are known, under whatever name and with whatever annotations."""
    return _instructions(function) in [_instructions(one) for one in known]


def _instructions(function: Callable[..., Any]) -> Any:
    function = inspect.unwrap(function)
    code = function.__code__
    constants = [constant for constant in code.co_consts if constant != function.__doc__]
    return code.co_code, code.co_names, code.co_varnames[: code.co_argcount], function.__defaults__, constants

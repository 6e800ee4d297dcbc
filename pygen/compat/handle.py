"""What a drop-in changed in another library or in a model, and how it is taken back.

`Changes` makes and remembers the changes, `Handle` is what the user holds, `Patch` counts the handles on a library.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

_ABSENT: Any = object()
_SHOWN_PLACES = 3


@dataclasses.dataclass(frozen=True)
class Replaced:
    """name: the class or function of the library; by: what stands in for it; places: the paths of the layers in a
    model, the methods of a class, or the names that a function was found by."""

    name: str
    by: str
    places: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.places)


@dataclasses.dataclass(frozen=True)
class Left:
    """What was left as it was, where, and why."""

    name: str
    reason: str
    places: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.places)


@dataclasses.dataclass
class _Set:
    owner: Any
    name: str
    before: Any
    after: Any


class Changes:
    """Attributes set on modules, classes and objects, and entries of dicts, with what is needed to put them back, and
    the report of it.

    in_force: whether stand-ins installed by `function` and `method` act; where it is False they pass every call on to
    the original. So a reference to a stand-in that outlives `undo` is the original by another name.
    """

    def __init__(self) -> None:
        self.in_force = True
        self._sets: list[_Set] = []
        self._replaced: dict[tuple[str, str], list[str]] = {}
        self._left: dict[tuple[str, str], list[str]] = {}

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        return tuple(Replaced(name, by, tuple(places)) for (name, by), places in self._replaced.items())

    @property
    def left(self) -> tuple[Left, ...]:
        return tuple(Left(name, reason, tuple(places)) for (name, reason), places in self._left.items())

    def report_replaced(self, name: str, by: str, place: str) -> None:
        """A line of the report: `name`, found at `place`, is now `by`."""
        self._replaced.setdefault((name, by), []).append(place)

    def report_left(self, name: str, reason: str, place: str) -> None:
        """A line of the report: `name`, found at `place`, stays, because of `reason`."""
        self._left.setdefault((name, reason), []).append(place)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute (`__class__` and the submodules of an `nn.Module` included) and remember what was there."""
        self._sets.append(_Set(owner, name, _read(owner, name), value))
        _write(owner, name, value)

    def swap_class(self, module: nn.Module, cls: type, place: str) -> None:
        """Give a live module another class: parameters, buffers, hooks and identity stay."""
        before = type(module)
        self.set(module, "__class__", cls)
        self.report_replaced(qualified_name(before), qualified_name(cls), place)

    def function(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """Put `replacement` in the place of `original` in every loaded module that has it under some name.

        A call that `replacement` answers with NotImplemented goes to `original`.
        """
        self.functions([(original, replacement)])

    def functions(self, pairs: Iterable[tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
        """`function` for many pairs of original and replacement, in one search."""
        wanted = {id(original): (original, replacement, self._stand_in(original, replacement))
                  for original, replacement in pairs}  # fmt: skip
        for module_name, module in list(sys.modules.items()):
            if not isinstance(module, types.ModuleType) or module_name.partition(".")[0] == "pygen":
                continue
            for name, value in list(vars(module).items()):
                if id(value) in wanted:
                    original, replacement, stand_in = wanted[id(value)]
                    self.set(module, name, stand_in)
                    self.report_replaced(qualified_name(original), qualified_name(replacement), f"{module_name}.{name}")

    def _stand_in(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        changes = self

        @functools.wraps(original)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            result = replacement(*args, **kwargs) if changes.in_force else NotImplemented
            return original(*args, **kwargs) if result is NotImplemented else result

        return stand_in

    def method(self, cls: type, name: str, replacement: Callable[..., Any]) -> None:
        """Put `replacement` in the place of a method, its own or inherited, of a class of the library.

        A subclass that overrides any other part of `cls` gets the original: the replacement does not call the parts.
        So does a call that `replacement` answers with NotImplemented.
        """
        original = getattr(cls, name)
        changes = self

        @functools.wraps(original)
        def stand_in(self: Any, *args: Any, **kwargs: Any) -> Any:
            if changes.in_force and (type(self) is cls or not overrides(type(self), cls, name)):  # type: ignore[arg-type]
                result = replacement(self, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return original(self, *args, **kwargs)

        self.set(cls, name, stand_in)
        self.report_replaced(qualified_name(cls), qualified_name(replacement).removesuffix(f".{name}"), name)

    def undo(self) -> None:
        """Put everything back, last change first. What somebody else has set since stays theirs, with a warning."""
        self.in_force = False
        while self._sets:
            change = self._sets.pop()
            if _read(change.owner, change.name) is change.after:
                _write(change.owner, change.name, change.before)
            else:
                warnings.warn(
                    f"{_describe(change.owner)}.{change.name} was changed again after pygen replaced it, and was left",
                    stacklevel=3,
                )


class Handle:
    """Lists what a drop-in replaced and what it left alone, and takes it back: `undo()`, or the end of a `with`.

    replaced, left: the lines of the report; `print(handle)` shows them as a table.
    """

    def __init__(
        self, title: str, replaced: tuple[Replaced, ...], left: tuple[Left, ...], undo: Callable[[], None]
    ) -> None:
        self.replaced = replaced
        self.left = left
        self._title = title
        self._undo: Callable[[], None] | None = undo
        self._lock = threading.Lock()

    @classmethod
    def of(cls, title: str, changes: Changes) -> Handle:
        """The handle of changes that are its own, such as those of one model."""
        return cls(title, changes.replaced, changes.left, changes.undo)

    @property
    def active(self) -> bool:
        """Whether this handle has not been undone."""
        return self._undo is not None

    def undo(self) -> None:
        """Take back what was replaced; a second call does nothing."""
        with self._lock:
            undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return _table(self._title, self.active, self.replaced, self.left)


class Patch:
    """The patch of one library, for the whole process: `patch()` returns a `Handle`.

    The first handle installs it and the last one to be undone takes it back, in whatever order and from whatever
    thread; so nested and overlapping patches are one patch.
    """

    def __init__(self, library: str, install: Callable[[Changes], None]) -> None:
        self._title = f"pygen.compat.{library}.patch"
        self._install = install
        self._changes = Changes()
        self._holders = 0
        self._lock = threading.RLock()

    def __call__(self) -> Handle:
        with self._lock:
            if self._holders == 0:
                changes = Changes()
                try:
                    self._install(changes)
                except BaseException:
                    changes.undo()
                    raise
                self._changes = changes
            self._holders += 1
            return Handle(self._title, self._changes.replaced, self._changes.left, self._release)

    def _release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._changes.undo()


def qualified_name(value: Any) -> str:
    """module.name of a class or function."""
    return f"{value.__module__}.{value.__qualname__}"


@functools.cache
def overrides(subclass: type, cls: type, except_for: str) -> bool:
    """Whether `subclass` has its own version of something that `cls` got from its library, other than construction
    and `except_for`."""
    library = cls.__module__.partition(".")[0]
    parts = {
        name
        for base in cls.__mro__
        if base.__module__.partition(".")[0] == library
        for name in vars(base)
        if not name.startswith("__") and name != except_for
    }
    before = subclass.__mro__[: subclass.__mro__.index(cls)]
    return any(name in parts for base in before for name in vars(base))


def _submodules(owner: Any, name: str) -> dict[str, Any] | None:
    if isinstance(owner, nn.Module) and name in owner._modules:
        return owner._modules
    return None


def _read(owner: Any, name: str) -> Any:
    if name == "__class__":
        return type(owner)
    if isinstance(owner, dict):
        return owner.get(name, _ABSENT)
    submodules = _submodules(owner, name)
    return (vars(owner) if submodules is None else submodules).get(name, _ABSENT)


def _write(owner: Any, name: str, value: Any) -> None:
    submodules = owner if isinstance(owner, dict) else _submodules(owner, name)
    if value is _ABSENT:
        if submodules is None:
            delattr(owner, name)
        else:
            del submodules[name]
    elif submodules is not None:
        submodules[name] = value
    elif isinstance(owner, type | types.ModuleType):
        setattr(owner, name, value)
    else:
        object.__setattr__(owner, name, value)


def _describe(owner: Any) -> str:
    if isinstance(owner, type):
        return qualified_name(owner)
    return owner.__name__ if isinstance(owner, types.ModuleType) else f"a {qualified_name(type(owner))}"


def _places(places: tuple[str, ...]) -> str:
    shown = ", ".join(place or "the model itself" for place in places[:_SHOWN_PLACES])
    more = len(places) - _SHOWN_PLACES
    return f"{shown} and {more} more" if more > 0 else shown


def _table(title: str, active: bool, replaced: tuple[Replaced, ...], left: tuple[Left, ...]) -> str:
    state = "" if active else " (undone)"
    lines = [f"{title}{state}: {sum(r.count for r in replaced)} replaced, {sum(e.count for e in left)} left alone"]
    rows: list[tuple[str, int, str, str, tuple[str, ...]]] = [
        ("replaced", r.count, r.name, f"-> {r.by}", r.places) for r in replaced
    ]
    rows += [("left alone", e.count, e.name, e.reason, e.places) for e in left]
    names = max((len(name) for _, _, name, _, _ in rows), default=0)
    notes = max((len(note) for _, _, _, note, _ in rows), default=0)
    lines += [
        f"  {state:10} {count:4} x  {name:{names}}  {note:{notes}}  {_places(places)}"
        for state, count, name, note, places in rows
    ]
    return "\n".join(lines)

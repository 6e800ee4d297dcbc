"""The masked networks of other libraries as nodes: read once, and anew where a part of them has changed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pygen.ops.kept import KeptResult, can_keep, probes, versions
from pygen.ops.masked_network import MaskedNetwork

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class Described:
    """A network as nodes, or why it is not known. parts: the modules in it, held so that none is replaced unseen."""

    nodes: MaskedNetwork | None
    why_not: str
    parts: tuple[nn.Module, ...]
    _probed: list[float] = dataclasses.field(default_factory=list)

    def refresh(self) -> None:
        """Drop what is kept of the weights where one was written to through `.data`, which moves no version."""
        assert self.nodes is not None
        own = self.nodes.parameters()
        now = probes(own) if can_keep(own) else []
        if not now or now != self._probed:
            self.nodes.forget()
            self._probed[:] = now


class Descriptions:
    """The descriptions of the networks of one kind, each forgotten with its network."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, KeptResult[Described]] = weakref.WeakKeyDictionary()

    def of(self, network: nn.Module, describe: Callable[[], MaskedNetwork]) -> Described:
        """What `describe()` makes of a network, kept while its parts and masks stay. Its ValueErrors say why it is not
        known; nor is a network with a part that does other things than its class says."""
        _, *parts = network.modules()
        masks = [mask for part in parts if isinstance(mask := getattr(part, "mask", None), Tensor)]
        altered = any(_is_altered(part) for part in (network, *parts))
        key = (altered, type(network), *map(id, parts), *map(type, parts), *versions(masks))

        def make() -> Described:
            try:
                if altered:
                    raise ValueError("its network has hooks or a forward of its own")
                return Described(describe(), "", tuple(parts))
            except ValueError as error:
                return Described(None, str(error), tuple(parts))

        return self._kept.setdefault(network, KeptResult()).get(key, masks, make)


def exactly(part: Any, *classes: type) -> Any:
    """The part of a network that was given, of one of these classes, its weights parametrized or not.

    ValueError: it is of another class, a derived one included, which may compute something else.
    """
    if parametrize.type_before_parametrizations(part) not in classes:
        raise ValueError(f"its network has a {type(part).__name__} in the place of a {classes[0].__name__}")
    return part


def _is_altered(part: nn.Module) -> bool:
    """Whether calling a part does other things than its class says."""
    return "forward" in vars(part) or any(getattr(part, hooks) for hooks in _HOOKS)

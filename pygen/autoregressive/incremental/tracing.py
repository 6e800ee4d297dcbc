"""Tracing: runs a network once on an example and follows what becomes of the sample's elements.

Every operation that reaches PyTorch's dispatcher with a tensor that depends on the sample is lowered to views and nodes
(see fields.py); what depends on the condition alone is put on a tape, to be replayed for each condition; everything
else, such as masks times weights, is computed as it is and counts as a constant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from pygen.autoregressive.incremental.fields import (
    ZERO,
    Arrangement,
    ConversionError,
    Field,
    Fixed,
    Input,
    Network,
    NotSeparable,
    Roles,
    find_roles,
    roles_of_places,
)


class View:
    """A tensor whose elements are those of fields, by their identities. `ids` has the tensor's shape."""

    def __init__(self, network: Network, ids: Tensor, roles: Roles | None = None) -> None:
        self.network, self.ids, self._roles = network, ids, roles

    @property
    def roles(self) -> Roles:
        if self._roles is None:
            self._roles = find_roles(self.network, self.ids)
        return self._roles

    @property
    def roles_if_any(self) -> Roles | None:
        """None where no dimension can be told to be the rows, or the columns, as of a part of a flattened picture."""
        try:
            return self.roles
        except NotSeparable:
            return None

    def moved(self, function: Callable[[Tensor], Any]) -> list[View]:
        """The views that a function makes which only moves elements. Rows and columns move with them, so that those
        that hold nothing but zeros stay rows and columns."""
        roles = self.roles_if_any
        outputs, _ = tree_flatten(function(self.ids))
        if roles is None:
            return [View(self.network, ids) for ids in outputs]
        rows, columns = (tree_flatten(function(where))[0] for where in roles.places(tuple(self.ids.shape)))
        return [View(self.network, *each) for each in zip(outputs, map(roles_of_places, rows, columns), strict=True)]

    def arrangement(self, shape: tuple[int, ...] | None = None) -> Arrangement:
        """For this view broadcast to a shape."""
        shape = tuple(self.ids.shape) if shape is None else shape
        if len(shape) == self.ids.dim():
            return Arrangement(shape, self.roles)
        return Arrangement(shape, find_roles(self.network, self.ids.expand(shape)))


@dataclasses.dataclass(frozen=True)
class OnTape:
    """A tensor that depends on the condition alone: its number on the tape, and its shape for one sample."""

    number: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation on the tape; values of the tape among its arguments are OnTape."""

    function: Any
    arguments: Any


class Tape:
    """What follows from the condition, value after value; value 0 is the condition itself, a batch of one."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.count = 1

    def record(self, function: Any, arguments: Any, outputs: list[Any]) -> list[OnTape]:
        self.calls.append(Call(function, arguments))
        numbers = range(self.count, self.count + len(outputs))
        self.count += len(outputs)
        return [OnTape(i, tuple(out.shape)) for i, out in zip(numbers, outputs, strict=True) if isinstance(out, Tensor)]

    def replay(self, condition: Tensor) -> list[Any]:
        """All values for one condition, (1, ...)."""
        values: list[Any] = [condition]
        for call in self.calls:
            args, kwargs = tree_map(lambda a: values[a.number] if isinstance(a, OnTape) else a, call.arguments)
            if call.function._schema.is_mutable:
                args, kwargs = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, (args, kwargs))
            values.extend(tree_flatten(call.function(*args, **kwargs))[0])
        return values


class Unusable:
    """What becomes of the weights of attention beside the product with the values: it may be returned, not used."""


Value = Any  # View, OnTape, Unusable, or what a lowering makes of half an attention
Lowering = Callable[..., Any]
_LOWERINGS: dict[str, Lowering] = {}
_BOUNDS = ("aten::aminmax", "aten::min", "aten::max")


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Decorator: the function lowers these operations. It is given the tracer, the operation and its arguments, with
    values in place of the tensors that depend on the sample, and returns a value for each output (None for one that
    nobody may use)."""

    def register(lowering: Lowering) -> Lowering:
        for name in names:
            _LOWERINGS[f"aten::{name}"] = lowering
        return lowering

    return register


class Tracer(TorchDispatchMode):
    """Lowers what is run inside of it."""

    def __init__(self, of_tokens: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of_tokens = of_tokens  # whether the sample is int64
        self.network, self.tape = Network(), Tape()
        self._values = WeakTensorKeyDictionary()
        self._modules: list[str] = []
        self._fixed: dict[Any, Field] = {}

    def follow(self, tensor: Tensor, value: Value) -> None:
        self._values[tensor] = value

    def value_of(self, tensor: Tensor) -> Value | None:
        return self._values.get(tensor)

    @contextlib.contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Inside, refusals name the module that was running."""
        names = {module: name for name, module in model.named_modules()}
        own = threading.get_ident()  # hooks are called for every thread

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == own:
                name = names.get(module, "")
                self._modules.append(f"{name} ({type(module).__name__})" if name else type(module).__name__)

        def leave(module: nn.Module, *_: Any) -> None:
            if threading.get_ident() == own:
                self._modules.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def refuse(self, function: Any, why: str) -> ConversionError:
        where = self._modules[-1] if self._modules else "the network"
        return ConversionError(f"{where} cannot be converted: {function}: {why}")

    def check_writes(self, function: Any, arguments: Any) -> None:
        """Refuse to write what is followed into a part of a tensor that is not."""
        for argument, given in zip(function._schema.arguments, arguments, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not written or not isinstance(given, Tensor) or self._values.get(given) is not None:
                continue
            if given.untyped_storage().nbytes() != given.nbytes:
                raise self.refuse(function, "it writes the sample into a part of something else")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments, follows = tree_flatten((args, kwargs))
        seen = [self._values.get(a) if isinstance(a, Tensor) else None for a in arguments]
        if all(value is None for value in seen):
            return function(*args, **kwargs)
        if function._schema.is_mutable:
            if any(isinstance(value, View) for value in seen):
                self.check_writes(function, args)
            # What it changes was another number before.
            arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        output = function(*args, **kwargs)
        mixed = [a if value is None else value for a, value in zip(arguments, seen, strict=True)]
        outputs, _ = tree_flatten(output)
        tensors = [out for out in outputs if isinstance(out, Tensor)]
        if not tensors:
            of_sample = any(value is not None and not isinstance(value, OnTape) for value in seen)
            what = "sample" if of_sample else "condition"
            raise self.refuse(function, f"the network looks at the values of the {what}")
        if all(value is None or isinstance(value, OnTape) for value in seen):
            if function._schema.name in _BOUNDS and len(args) == 1 and not args[0].is_floating_point():
                return output  # `one_hot` checks its codes
            kept = [a.clone() if isinstance(a, Tensor) else a for a in mixed]
            found: list[Value] = list(self.tape.record(function, tree_unflatten(kept, follows), outputs))
        else:
            found = self._lower(function, *tree_unflatten(mixed, follows))
        for tensor, value in zip(tensors, found, strict=True):
            if value is not None:
                self.follow(tensor, value)
        return output

    def _lower(self, function: Any, args: Any, kwargs: Any) -> list[Value]:
        name = function._schema.name
        followed = [value for value in tree_flatten((args, kwargs))[0] if not isinstance(value, (Tensor, OnTape))]
        if any(isinstance(value, Unusable) for value in followed):
            if any(isinstance(value, View) for value in followed):
                raise self.refuse(function, "the weights of attention are used for more than to weigh the values")
            return [Unusable()] * len(function._schema.returns)
        lowering = _LOWERINGS.get(name) or _LOWERINGS.get(name.removesuffix("_"))
        if lowering is None:
            raise self.refuse(function, "this operation is not supported, or mixes places of the picture")
        try:
            found = lowering(self, function, *args, **kwargs)
        except ConversionError as error:
            if "cannot be converted" in str(error):
                raise
            raise type(error)(str(self.refuse(function, str(error)))) from error
        except Exception as error:
            # A lowering reads the arguments in the ways that it knows.
            raise self.refuse(function, "with these arguments it is not supported") from error
        return found if isinstance(found, list) else [found]

    def view(self, value: Any, shape: tuple[int, ...], roles: Roles) -> Tensor:
        """Identities of a value broadcast to a shape: a view's own, those of a constant, or of what is on the tape."""
        if isinstance(value, View):
            return value.ids.expand(shape)
        arrangement = Arrangement(shape, roles)
        if isinstance(value, OnTape):
            return arrangement.from_grid(self._of_tape(value, arrangement))
        if not isinstance(value, Tensor):
            raise ConversionError("half an attention is used for something else")
        grid = arrangement.to_grid(value.detach().cpu())
        if not grid.any():
            return torch.full(shape, ZERO)
        field = self.network.add_constant(grid)
        return arrangement.from_grid(field.ids().expand(grid.shape))

    def _of_tape(self, value: OnTape, arrangement: Arrangement) -> Tensor:
        """Identities (channels, height, width); rows and columns that the value does not have are one in its field."""
        shape, roles = list(arrangement.shape), arrangement.roles
        for d in (roles.rows, roles.columns):
            own = None if d is None else len(value.shape) - len(shape) + d
            if d is not None and own is not None and (own < 0 or value.shape[own] == 1):
                shape[d] = 1
        if roles.flat is not None and roles.rows is not None and shape[roles.rows] == 1:
            roles = Roles(roles.rows, None)
        reduced = Arrangement(tuple(shape), roles)
        key = (value.number, reduced.shape, reduced.roles)
        if key not in self._fixed:
            self._fixed[key] = self.network.add(Fixed(value.number, reduced), *reduced.grid)
        return self._fixed[key].ids().expand(arrangement.grid)


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, gradients and autocast are off, attention is written out, and float32 is
    not rounded to TF32, as it is by default in convolutions on a GPU."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    cudnn: Any = torch.backends.cudnn
    precise = [cudnn.conv, torch.backends.cuda.matmul]
    precisions = [each.fp32_precision for each in precise]
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    for each in precise:
        each.fp32_precision = "ieee"
    try:
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            for each in (torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH)):
                stack.enter_context(each)
            yield
    finally:
        for each, precision in zip(precise, precisions, strict=True):
            each.fp32_precision = precision
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in training.items():
            module.training = was


@dataclasses.dataclass(eq=False)
class Traced:
    """A network as fields: the sample, and what each element's distribution is read from, (outputs, height, width)."""

    network: Network
    tape: Tape
    sample: Field
    output: View


def trace(
    model: nn.Module, forward: Callable[..., Tensor], x: Tensor, condition: Tensor | None, grid: Tensor
) -> Traced:
    """Run forward(x[, condition]) on an example x, a batch of one, and follow it.

    grid: (channels, height, width) places of x's elements, x flattened: where the elements of the sample's field lie.
    """
    tracer = Tracer(of_tokens=not x.is_floating_point())
    sample = tracer.network.add(Input(), *grid.shape)
    ids = torch.empty(x.numel(), dtype=torch.int64)
    ids[grid.flatten()] = sample.ids().flatten()

    def call(*inputs: Tensor) -> Any:
        return forward(*inputs)

    with evaluation(model), tracer.naming(model):
        # What a network makes once and keeps must not be of the tracer's kind.
        forward(x.clone(), *([] if condition is None else [condition.clone()]))
        x = x.clone()
        inputs = [x] if condition is None else [x, condition.clone()]
        tracer.follow(x, View(tracer.network, ids.view(x.shape)))
        if condition is not None:
            tracer.follow(inputs[1], OnTape(0, tuple(condition.shape)))
        try:
            with tracer:
                output = torch.func.functionalize(call)(*inputs)
        except ConversionError:
            raise
        except Exception as error:
            raise tracer.refuse(type(error).__name__, str(error)) from error
    value = tracer.value_of(output) if isinstance(output, Tensor) else None
    if value is None:
        raise ConversionError("the network's output does not depend on the sample, or is not a tensor")
    if not isinstance(value, View):
        what = "depends on the condition alone" if isinstance(value, OnTape) else "is a part of attention"
        raise ConversionError(f"the network's output {what}")
    return Traced(tracer.network, tracer.tape, sample, value)

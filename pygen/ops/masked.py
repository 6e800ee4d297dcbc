"""The inverse of a masked autoregressive transform in one sweep, and its gradient in another.

y_i = tau(x_i; p_i), with p_i a function of the inputs before i (Papamakarios et al. 2017, MAF, arXiv:1705.07057,
eq. 3-4; with the directions exchanged Kingma et al. 2016, IAF, arXiv:1606.04934, eq. 10-11). Solving for x one input
after the other, each hidden unit can be computed once, when its last input is known, instead of D times.

Gradient. Let g and G be the cotangents of x and ladj, and xbar_i that of x_i in all. Differentiating the equation,
xbar_i = g_i - G dl_i/dx_i + sum_j>i (dp_j/dx_i)^T pbar_j,  pbar_i = -(xbar_i / tau'_i) dtau_i/dp_i - G dl_i/dp_i,
ybar_i = xbar_i / tau'_i, with l = log tau': a triangular system in xbar, linear, with the network's own weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from pygen import _native
from pygen.ops import coupling, spline
from pygen.ops.arguments import arithmetic_dtype
from pygen.ops.masked_network import MaskedNetwork, Tensors
from pygen.ops.masked_program import MaskedPlan


class Derivatives(NamedTuple):
    """Of y = tau(x; p) and l = log dy/dx, elementwise; G is the cotangent of the sum of l."""

    slope: Tensor  # dy/dx, (n, features)
    by_parameters: Tensor  # dy/dp, (n, features, per_input)
    ladj_by_x: Tensor  # G dl/dx, (n, features)
    ladj_by_parameters: Tensor  # G dl/dp, (n, features, per_input)


class Elementwise(Protocol):
    """The map of one input given its parameters: `MaskedAffine` or `MaskedSpline`."""

    @property
    def layout(self) -> tuple[int, ...]:
        """How many parameters an input has, and whatever else `unit_of` depends on."""

    def unit_of(self, features: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(features, per_input): the network's output that is a parameter of an input."""

    def __call__(
        self, x: Tensor, outputs: Tensor, *, inverse: bool = False, event_dims: int = 1
    ) -> tuple[Tensor, Tensor]:
        """x (n, features) mapped with the network's outputs (n, features * per_input), and the log-determinant."""

    def sweep(self, kernels: Any, samples: Tensor, *program: Any) -> tuple[Tensor, Tensor]:
        """Call the kernel that solves for x."""

    def derivatives(self, kernels: Any, x: Tensor, outputs: Tensor, grad_ladj: Tensor) -> Derivatives:
        """The derivatives at x, from which the gradient of the sweep is made."""


@dataclasses.dataclass(frozen=True)
class MaskedAffine:
    """y = x s + t with s = activation(u + offset) + epsilon: what the outputs of a MAF's network mean.

    activation, limit, offset, epsilon: as for `affine`. nflows: "softplus" with epsilon 1e-3; zuko: "softclip" with
        limit ln 1000.
    scale_first: an input's parameters are (u, t), as nflows and normflows have them; otherwise (t, u), as zuko.
    interleaved: the parameters of an input lie side by side, as in all three; otherwise the first parameters of all
        inputs come before the second ones.

    ValueError: where `affine` raises it.
    """

    activation: str = "exp"
    limit: float | None = None
    offset: float = 0.0
    epsilon: float = 0.0
    scale_first: bool = True
    interleaved: bool = True

    def __post_init__(self) -> None:
        self._affine(torch.zeros(0), torch.zeros(0), torch.zeros(0))

    @property
    def layout(self) -> tuple[int, ...]:
        return 2, self.scale_first, self.interleaved

    def unit_of(self, features: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        units = _units(features, 2, self.interleaved)
        return units if self.scale_first else units[:, ::-1]

    def _affine(self, x: Tensor, raw_scale: Tensor, shift: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return coupling.affine(
            x, raw_scale, shift, activation=self.activation, limit=self.limit, offset=self.offset,
            epsilon=self.epsilon, **options,
        )  # fmt: skip

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        first, second = outputs.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else outputs.chunk(2, -1)
        return (first, second) if self.scale_first else (second, first)

    def __call__(
        self, x: Tensor, outputs: Tensor, *, inverse: bool = False, event_dims: int = 1
    ) -> tuple[Tensor, Tensor]:
        return self._affine(x, *self._split(outputs), inverse=inverse, event_dims=event_dims)

    @property
    def _options(self) -> tuple[int, float, float, float]:
        code = coupling.ACTIVATIONS.index(self.activation)
        return code, 1.0 if self.limit is None else self.limit, self.offset, self.epsilon

    def sweep(self, kernels: Any, samples: Tensor, *program: Any) -> tuple[Tensor, Tensor]:
        x, ladj = kernels.masked_affine_inverse(samples, *program, *self._options)
        return x, ladj

    def derivatives(self, kernels: Any, x: Tensor, outputs: Tensor, grad_ladj: Tensor) -> Derivatives:
        raw, _ = self._split(outputs)
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        slope, by_raw = kernels.affine_backward(x, raw, one, torch.zeros_like(grad_ladj), *self._options, 1, False)
        _, ladj_by_raw = kernels.affine_backward(x, raw, zero, grad_ladj, *self._options, 1, False)
        return Derivatives(slope, torch.stack((by_raw, one), -1), zero, torch.stack((ladj_by_raw, zero), -1))


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedSpline:
    """y by a monotone rational-quadratic spline: what the outputs of an autoregressive spline flow's network mean.

    bins: K. An input's parameters are its widths, heights and derivatives, side by side, as nflows, normflows and zuko
        have them.
    The others are those of `rational_quadratic_spline`.

    ValueError: where `rational_quadratic_spline` raises it.
    """

    bins: int
    tails: spline.Tails = None
    domain: tuple[spline.Bound, spline.Bound] = (0.0, 1.0)
    image: tuple[spline.Bound, spline.Bound] | None = None
    min_bin_width: float = 1e-3
    min_bin_height: float = 1e-3
    min_derivative: float = 1e-3
    parametrization: str = "softplus"
    slope: float = 1e-3
    boundary_slope: float = 1.0
    identity_init: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        features = len(self.tails) if isinstance(self.tails, Sequence) and not isinstance(self.tails, str) else 1
        tensors = [each for pair in (self.domain, self.image) if pair for each in pair if isinstance(each, Tensor)]
        features = max(features, *(each.numel() for each in tensors)) if tensors else features
        self._settle(torch.zeros(0, features, device=tensors[0].device if tensors else None))

    @property
    def per_input(self) -> int:
        """How many parameters an input has."""
        more = {None: 1, "linear": -1, "circular": 0}
        return 3 * self.bins + (more.get(self.tails, 1) if self.tails is None or isinstance(self.tails, str) else 1)

    @property
    def layout(self) -> tuple[int, ...]:
        return (self.per_input,)

    def unit_of(self, features: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return _units(features, self.per_input, interleaved=True)

    @property
    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _settle(self, x: Tensor) -> tuple[Tensor | None, tuple[Any, ...]]:
        """What all splines share: the table of their bounds, and the kernels' other arguments."""
        _, dimensions, settled = spline._settle(x, x.new_zeros(self.per_input), **self._options)
        return dimensions, settled

    def __call__(
        self, x: Tensor, outputs: Tensor, *, inverse: bool = False, event_dims: int = 1
    ) -> tuple[Tensor, Tensor]:
        parameters = outputs.unflatten(-1, (-1, self.per_input))
        return spline.rational_quadratic_spline(
            x, parameters, inverse=inverse, event_dims=event_dims, **self._options
        )  # fmt: skip

    def sweep(self, kernels: Any, samples: Tensor, *program: Any) -> tuple[Tensor, Tensor]:
        dimensions, settled = self._settle(samples[:, : program[-1]])
        x, ladj = kernels.masked_spline_inverse(samples, *program, dimensions, *settled[:-1])
        return x, ladj

    def derivatives(self, kernels: Any, x: Tensor, outputs: Tensor, grad_ladj: Tensor) -> Derivatives:
        dimensions, settled = self._settle(x)
        parameters = outputs.unflatten(-1, (-1, self.per_input))

        def pull(grad_y: Tensor, grad_ladj: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = kernels.rational_quadratic_spline_backward(
                x, (parameters,), dimensions, grad_y, grad_ladj, *settled, False
            )
            return found

        slope, by_parameters = pull(torch.ones_like(x), torch.zeros_like(grad_ladj))
        return Derivatives(slope, by_parameters, *pull(torch.zeros_like(x), grad_ladj))


def _units(features: int, per_input: int, interleaved: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
    units = np.arange(features * per_input)
    return units.reshape(features, per_input) if interleaved else units.reshape(per_input, features).T


def plan_of(network: MaskedNetwork, elementwise: Elementwise) -> MaskedPlan:
    """The programs of a network whose outputs are the parameters of `elementwise`, made once.

    ValueError: the network is not autoregressive (the sentence names an output and the input that it must not depend
    on), or does not have as many outputs as the map has parameters.
    """
    key = elementwise.layout
    if key not in network.plans:
        network.plans[key] = MaskedPlan(network, elementwise.unit_of(network.features))
    plan: MaskedPlan = network.plans[key]
    return plan


def masked_inverse_reference(
    y: Tensor, network: MaskedNetwork, context: Tensor | None = None, *, elementwise: Elementwise
) -> tuple[Tensor, Tensor]:
    """`masked_inverse` as D passes through the network, in plain PyTorch: its specification, its fallback, and the
    oracle of its tests."""
    _check(y, network, context)
    return _passes(y, context, network, elementwise, Tensors(network.parameters(), arithmetic_dtype(y)))


def _passes(
    y: Tensor, context: Tensor | None, network: MaskedNetwork, elementwise: Elementwise, tensors: Tensors
) -> tuple[Tensor, Tensor]:
    value = y.to(tensors.dtype)
    x, ladj = torch.zeros_like(value), value.new_zeros(y.shape[:-1])
    with torch.autocast(y.device.type, enabled=False):
        for _ in range(network.features):
            outputs = cast(Tensor, network.evaluate(x, context, tensors)[-1])
            x, ladj = elementwise(value, outputs, inverse=True)
    return x.to(y.dtype), ladj


@_native.register_fake("masked_affine_inverse")
@_native.register_fake("masked_spline_inverse")
def _inverse_fake(
    samples: Tensor, weights: Tensor, constants: Tensor, program: Tensor, device_program: Tensor, features: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return samples.new_empty((samples.shape[0], features)), samples.new_empty((samples.shape[0],))


@_native.register_fake("masked_backward")
def _backward_fake(samples: Tensor, weights: Tensor, program: Tensor, device_program: Tensor, outputs: int) -> Tensor:
    return samples.new_empty((samples.shape[0], outputs))


def _solve(
    y: Tensor, context: Tensor | None, network: MaskedNetwork, elementwise: Elementwise, tensors: Tensors
) -> tuple[Tensor, Tensor]:
    """x and ladj for y (n, features), in the dtype of the arithmetic."""
    plan = plan_of(network, elementwise)
    samples = [y.to(tensors.dtype)]
    if plan.fixed:
        with torch.autocast(y.device.type, enabled=False):
            values = network.evaluate(None, context, tensors)
        samples += [cast(Tensor, values[index]) for index in plan.fixed]
    side_by_side = torch.cat(samples, 1) if len(samples) > 1 else samples[0].contiguous()
    program = plan.code("inverse", y.device)
    return elementwise.sweep(
        _native.kernels_for(y), side_by_side, plan.weights("inverse", tensors), plan.constants(tensors), *program,
        network.features,
    )  # fmt: skip


def _recorded(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensors:
    """What is made of parameters that are being trained serves no second call."""
    return Tensors(parameters, dtype, keep=not any(parameter.requires_grad for parameter in parameters))


class _MaskedInverse(torch.autograd.Function):
    """Saves x and y beside the arguments: no value of a hidden unit."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, context: Tensor | None, network: MaskedNetwork, elementwise: Elementwise,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, ladj = _solve(y, context, network, elementwise, _recorded(parameters, arithmetic_dtype(y)))
        ctx.network, ctx.elementwise = network, elementwise
        ctx.save_for_backward(y, x, context, *parameters)
        return x.to(y.dtype), ladj

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        y, x, context, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _backward_through_passes(ctx, y, context, parameters, grad_x, grad_ladj)
        with torch.autocast(y.device.type, enabled=False):
            return _backward(ctx, y, x, context, _recorded(parameters, x.dtype), grad_x, grad_ladj)


def _backward(
    ctx: Any, y: Tensor, x: Tensor, context: Tensor | None, tensors: Tensors, grad_x: Tensor, grad_ladj: Tensor
) -> tuple[Tensor | None, ...]:
    network, plan, kernels = ctx.network, plan_of(ctx.network, ctx.elementwise), _native.kernels_for(y)
    assert kernels is not None
    values = network.evaluate(x, context, tensors)
    at = ctx.elementwise.derivatives(kernels, x, values[-1], grad_ladj)
    # pbar = a xbar + b
    a, b = -at.by_parameters / at.slope.unsqueeze(-1), -at.ladj_by_parameters
    samples = [grad_x.to(x.dtype) - at.ladj_by_x, a.flatten(1), b.flatten(1)]
    for index, position in plan.slopes:
        of = [values[source] for source in network.nodes[index].sources]
        samples.append(network.slope(index, position, of, tensors).expand(len(x), -1))
    program, outputs = plan.code("backward", y.device), plan.programs["backward"].outputs
    found = kernels.masked_backward(torch.cat(samples, 1), plan.weights("backward", tensors), *program, outputs)
    grad_y = (found[:, : network.features] / at.slope).to(y.dtype)
    if not any(ctx.needs_input_grad[1:]):
        return grad_y, None, None, None, *(None for _ in tensors.own)

    cotangents, column = {}, network.features
    for index in plan.reported:
        cotangents[index] = found[:, column : column + network.nodes[index].units]
        column += network.nodes[index].units
    gradients, total = network.backward(values, cotangents, tensors, plan.placement.nodes)
    grad_context = None
    if context is not None and ctx.needs_input_grad[1] and network.context in total:
        grad_context = total[network.context].to(context.dtype)
    of_parameters = [
        gradient.to(parameter.dtype) if gradient is not None and needed else None
        for gradient, parameter, needed in zip(gradients, tensors.own, ctx.needs_input_grad[4:], strict=True)
    ]
    return grad_y, grad_context, None, None, *of_parameters


def _backward_through_passes(
    ctx: Any, y: Tensor, context: Tensor | None, parameters: Sequence[Tensor], grad_x: Tensor, grad_ladj: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function, for second derivatives: that of the reference, at its cost."""
    x, ladj = _passes(y, context, ctx.network, ctx.elementwise, Tensors(parameters, arithmetic_dtype(y)))
    inputs = (y, context, None, None, *parameters)
    wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed and each is not None]
    found = iter(
        torch.autograd.grad((x, ladj), wanted, (grad_x, grad_ladj), create_graph=True, allow_unused=True)
    )  # fmt: skip
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def masked_inverse(
    y: Tensor, network: MaskedNetwork, context: Tensor | None = None, *, elementwise: Elementwise
) -> tuple[Tensor, Tensor]:
    """Solve y_i = tau(x_i; p_i) for x, where p = network(x, context) and p_i depends on the inputs before i alone.

    A sweep costs about what half of one pass through the network costs, where the plain way takes D passes. Its
    gradient is a second sweep and one backward pass, from x alone: nothing of the first is stored.

    Args:
        y: (*batch, features), float32, float64, bfloat16 or float16, any strides.
        network: from x and the context to the parameters; any stack of masked layers (see `MaskedNetwork`).
        context: (*batch, context_features), for a network that has one.
        elementwise: tau, and where in the network's outputs its parameters lie: `MaskedAffine` or `MaskedSpline`.

    Returns:
        x, with y's shape and dtype, and ladj (*batch) = log |det dx/dy| in nats, float32 (float64 for float64 y).
        Arithmetic is in float32 (float64 for float64 y), whatever the dtype of the weights. A row is bit for bit the
        same in any batch, and NaN stays in its row.

    Gradients for y, the context and the network's parameters; second derivatives go through the D passes of the
    reference. Weights are packed anew when a parameter has changed, and at each call where parameters get a gradient
    or a tracer looks on; before `torch.compile` call this once, or `plan_of`, to find the order of the units.

    Raises:
        ValueError: for a network that is not autoregressive, naming the offending pair; for outputs that do not fit
            the map; for shapes or devices that do not fit.
        TypeError: for a dtype that is not floating.
    """
    _check(y, network, context)
    parameters, dtype = network.parameters(), arithmetic_dtype(y)
    if _native.kernels_for(y) is None:
        return _passes(y, context, network, elementwise, Tensors(parameters, dtype))
    batch = y.shape[:-1]
    if y.dim() != 2:
        y = y.reshape(-1, network.features)
        context = None if context is None else context.reshape(-1, network.context_features)
    if _native.wants_gradient(y, context, *parameters):
        x, ladj = _MaskedInverse.apply(  # type: ignore[no-untyped-call]
            y, context, network, elementwise, *parameters
        )
    else:
        x, ladj = _solve(y, context, network, elementwise, Tensors(parameters, dtype, keep=True))
        x = x.to(y.dtype)
    return x.reshape(*batch, network.features), ladj.reshape(batch)


def _check(y: Tensor, network: MaskedNetwork, context: Tensor | None) -> None:
    if not y.is_floating_point():
        raise TypeError(f"y has dtype {y.dtype}, but expected float32, float64, bfloat16 or float16")
    if y.dim() == 0 or y.shape[-1] != network.features:
        raise ValueError(f"y has shape {tuple(y.shape)}, but expected (*batch, {network.features})")
    if (context is not None) != (network.context_features > 0):
        given = "given" if context is not None else "None"
        raise ValueError(f"context is {given}, but the network has {network.context_features} context features")
    if context is None:
        return
    expected = (*y.shape[:-1], network.context_features)
    if context.shape != expected:
        raise ValueError(f"context has shape {tuple(context.shape)}, but expected {expected}")
    if context.device != y.device:
        raise ValueError(f"context is on {context.device}, but expected y's {y.device}")

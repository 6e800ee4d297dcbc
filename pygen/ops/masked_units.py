"""The activations of a masked network, by name, and their derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# In the order of `enum class Unit` in csrc/masked.h, with the default of the parameter where there is one.
ACTIVATIONS: dict[str, float | None] = {
    "relu": None,
    "leaky_relu": 0.01,
    "elu": 1.0,
    "tanh": None,
    "sigmoid": None,
    "silu": None,
    "gelu": None,
    "gelu_tanh": None,
    "softplus": 1.0,
}

_GELU_TANH = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def activate(name: str, parameter: float, h: Tensor) -> Tensor:
    """The value of an activation at h."""
    if name == "relu":
        return functional.relu(h)
    if name == "leaky_relu":
        return functional.leaky_relu(h, parameter)
    if name == "elu":
        return functional.elu(h, parameter)
    if name == "tanh":
        return h.tanh()
    if name == "sigmoid":
        return h.sigmoid()
    if name == "silu":
        return functional.silu(h)
    if name == "gelu":
        return functional.gelu(h)
    if name == "gelu_tanh":
        return functional.gelu(h, approximate="tanh")
    return functional.softplus(h, parameter)


def slope_of(name: str, parameter: float, h: Tensor) -> Tensor:
    """The derivative of an activation at h."""
    if name == "relu":
        return (h > 0).to(h.dtype)
    if name == "leaky_relu":
        return torch.where(h > 0, 1.0, parameter).to(h.dtype)
    if name == "elu":
        return torch.where(h > 0, 1.0, parameter * h.clamp_max(0).exp())
    if name == "tanh":
        return 1 - h.tanh().square()
    if name == "sigmoid":
        return h.sigmoid() * (-h).sigmoid()
    if name == "silu":
        gate = h.sigmoid()
        return gate * (1 + h * (-h).sigmoid())
    if name == "gelu":
        density = (-0.5 * h.square()).exp() / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * density
    if name == "gelu_tanh":
        t = (_GELU_TANH * (h + _GELU_CUBIC * h**3)).tanh()
        return 0.5 * (1 + t) + 0.5 * h * (1 - t.square()) * _GELU_TANH * (1 + 3 * _GELU_CUBIC * h.square())
    return (parameter * h).sigmoid()

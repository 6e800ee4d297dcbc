"""Normalizing flows: exact densities by an invertible map to the prior, layer by layer."""

from pygen.flows.base import Base, ConditionalNormal, DiagonalNormal, StandardLogistic, StandardNormal, Uniform
from pygen.flows.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    AffineInjector,
    Coupling,
    MixtureCoupling,
    SplineCoupling,
)
from pygen.flows.flow import Flow
from pygen.flows.realnvp import RealNVP, RealNVPConfig
from pygen.flows.transform import FirstHalf, Inverse, Stack, Transform

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "AffineInjector",
    "Base",
    "ConditionalNormal",
    "Coupling",
    "DiagonalNormal",
    "FirstHalf",
    "Flow",
    "Inverse",
    "MixtureCoupling",
    "RealNVP",
    "RealNVPConfig",
    "SplineCoupling",
    "Stack",
    "StandardLogistic",
    "StandardNormal",
    "Transform",
    "Uniform",
]

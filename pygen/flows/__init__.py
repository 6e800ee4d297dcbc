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
from pygen.flows.glow import Glow, GlowConfig
from pygen.flows.linear import InvertibleLinear
from pygen.flows.neural_spline import NeuralSplineFlow, NeuralSplineFlowConfig, neural_spline_flow
from pygen.flows.nice import NICE, NICEConfig
from pygen.flows.normalization import ActNorm
from pygen.flows.permutation import Permutation
from pygen.flows.pictures import Logit, PictureFlow, PictureFlowConfig
from pygen.flows.realnvp import RealNVP, RealNVPConfig
from pygen.flows.reshape import Flatten, Haar, Squeeze
from pygen.flows.tarflow import MetaBlock, TarFlow, TarFlowConfig
from pygen.flows.transform import FirstHalf, Inverse, Reshape, Stack, Step, Transform

__all__ = [
    "NICE",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "AffineInjector",
    "Base",
    "ConditionalNormal",
    "Coupling",
    "DiagonalNormal",
    "FirstHalf",
    "Flatten",
    "Flow",
    "Glow",
    "GlowConfig",
    "Haar",
    "Inverse",
    "InvertibleLinear",
    "Logit",
    "MetaBlock",
    "MixtureCoupling",
    "NICEConfig",
    "NeuralSplineFlow",
    "NeuralSplineFlowConfig",
    "Permutation",
    "PictureFlow",
    "PictureFlowConfig",
    "RealNVP",
    "RealNVPConfig",
    "Reshape",
    "SplineCoupling",
    "Squeeze",
    "Stack",
    "StandardLogistic",
    "StandardNormal",
    "Step",
    "TarFlow",
    "TarFlowConfig",
    "Transform",
    "Uniform",
    "neural_spline_flow",
]

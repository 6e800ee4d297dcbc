"""Normalizing flows: exact densities by an invertible map to the prior, layer by layer."""

from pygen.flows.autoregressive import MaskedAutoregressive
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
from pygen.flows.flowpp import FlowPP, FlowPPConfig
from pygen.flows.glow import Glow, GlowConfig
from pygen.flows.linear import InvertibleLinear
from pygen.flows.maf import IAF, MAF, MAFConfig, inverse_autoregressive_flow, masked_autoregressive_flow
from pygen.flows.neural_spline import (
    AutoregressiveSplineFlow,
    NeuralSplineFlow,
    NeuralSplineFlowConfig,
    neural_spline_flow,
)
from pygen.flows.nice import NICE, NICEConfig
from pygen.flows.normalization import ActNorm
from pygen.flows.permutation import Permutation
from pygen.flows.pictures import Logit, PictureFlow, PictureFlowConfig
from pygen.flows.realnvp import RealNVP, RealNVPConfig
from pygen.flows.reshape import Flatten, Haar, Squeeze
from pygen.flows.tarflow import MetaBlock, TarFlow, TarFlowConfig
from pygen.flows.transform import FirstHalf, Inverse, Reshape, Stack, Step, Transform

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "AffineInjector",
    "AutoregressiveSplineFlow",
    "Base",
    "ConditionalNormal",
    "Coupling",
    "DiagonalNormal",
    "FirstHalf",
    "Flatten",
    "Flow",
    "FlowPP",
    "FlowPPConfig",
    "Glow",
    "GlowConfig",
    "Haar",
    "Inverse",
    "InvertibleLinear",
    "Logit",
    "MAFConfig",
    "MaskedAutoregressive",
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
    "inverse_autoregressive_flow",
    "masked_autoregressive_flow",
    "neural_spline_flow",
]

"""Normalizing flows: exact densities by an invertible map to the prior, layer by layer."""

from pygen.flows.coupling import AffineCoupling
from pygen.flows.realnvp import RealNVP, RealNVPConfig

__all__ = ["AffineCoupling", "RealNVP", "RealNVPConfig"]

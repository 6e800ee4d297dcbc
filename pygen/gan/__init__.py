"""Generative adversarial networks."""

from pygen.gan.gan import GAN, GANConfig
from pygen.gan.losses import OBJECTIVES, Objective

__all__ = ["GAN", "OBJECTIVES", "GANConfig", "Objective"]

"""Variational autoencoders."""

from pygen.vae.likelihood import discretized_logistic_log_prob
from pygen.vae.vae import VAE, Posterior, VAEConfig

__all__ = ["VAE", "Posterior", "VAEConfig", "discretized_logistic_log_prob"]

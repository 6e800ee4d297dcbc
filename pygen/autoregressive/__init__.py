"""Autoregressive models: exact densities by the chain rule, one element after another."""

from pygen.autoregressive.gated_pixelcnn import GatedPixelCNN, GatedPixelCNNConfig

__all__ = ["GatedPixelCNN", "GatedPixelCNNConfig"]

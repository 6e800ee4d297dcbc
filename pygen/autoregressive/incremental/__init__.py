"""Sampling a masked convolutional network at the cost of about one pass through it."""

from pygen.autoregressive.incremental.conversion import incremental
from pygen.autoregressive.incremental.converted import Incremental, IncrementalState
from pygen.autoregressive.incremental.fields import ConversionError

__all__ = ["ConversionError", "Incremental", "IncrementalState", "incremental"]

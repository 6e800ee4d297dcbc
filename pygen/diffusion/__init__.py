"""Diffusion: noise is undone step by step, with as many steps as one likes, and log p(x) is bounded from below."""

from __future__ import annotations

from pygen.diffusion.ddpm import Diffusion, DiffusionConfig

__all__ = ["Diffusion", "DiffusionConfig"]

"""The operators, each loaded with its kernel family on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Not lazily: a later import of the file `noise` would put the module where this function is expected.
from pygen.ops.noise import noise

if TYPE_CHECKING:
    from pygen.ops.cache import append_cached, attend_cached
    from pygen.ops.cache_reference import append_cached_reference, attend_cached_reference
    from pygen.ops.coupling import affine, affine_reference
    from pygen.ops.incremental import incremental_advance, incremental_advance_reference
    from pygen.ops.logistics import (
        discretized_logistics_log_prob,
        discretized_logistics_log_prob_reference,
        sample_discretized_logistics,
        sample_discretized_logistics_reference,
    )
    from pygen.ops.masked import MaskedAffine, MaskedSpline, masked_inverse, masked_inverse_reference
    from pygen.ops.masked_network import MaskedNetwork
    from pygen.ops.mixture import logistic_mixture, logistic_mixture_reference
    from pygen.ops.noise import noise_reference, uniform, uniform_reference
    from pygen.ops.piecewise import (
        cubic_spline,
        cubic_spline_reference,
        linear_spline,
        linear_spline_reference,
        quadratic_spline,
        quadratic_spline_reference,
    )
    from pygen.ops.rotary import Rotary, rotary_tables, rotary_tables_2d
    from pygen.ops.sampling import filter_logits, filter_logits_reference, sample_logits, sample_logits_reference
    from pygen.ops.schedule import diffusion_step, diffusion_step_reference
    from pygen.ops.speculative import speculative_accept, speculative_accept_reference
    from pygen.ops.spline import rational_quadratic_spline, rational_quadratic_spline_reference
    from pygen.ops.wavelet import haar, haar_reference, squeeze, squeeze_reference

_FAMILY_OF = {
    "MaskedAffine": "masked",
    "MaskedNetwork": "masked_network",
    "MaskedSpline": "masked",
    "Rotary": "rotary",
    "affine": "coupling",
    "affine_reference": "coupling",
    "append_cached": "cache",
    "append_cached_reference": "cache_reference",
    "attend_cached": "cache",
    "attend_cached_reference": "cache_reference",
    "cubic_spline": "piecewise",
    "cubic_spline_reference": "piecewise",
    "diffusion_step": "schedule",
    "diffusion_step_reference": "schedule",
    "discretized_logistics_log_prob": "logistics",
    "discretized_logistics_log_prob_reference": "logistics",
    "filter_logits": "sampling",
    "filter_logits_reference": "sampling",
    "haar": "wavelet",
    "haar_reference": "wavelet",
    "incremental_advance": "incremental",
    "incremental_advance_reference": "incremental",
    "linear_spline": "piecewise",
    "linear_spline_reference": "piecewise",
    "logistic_mixture": "mixture",
    "logistic_mixture_reference": "mixture",
    "masked_inverse": "masked",
    "masked_inverse_reference": "masked",
    "noise_reference": "noise",
    "quadratic_spline": "piecewise",
    "quadratic_spline_reference": "piecewise",
    "rational_quadratic_spline": "spline",
    "rational_quadratic_spline_reference": "spline",
    "rotary_tables": "rotary",
    "rotary_tables_2d": "rotary",
    "sample_discretized_logistics": "logistics",
    "sample_discretized_logistics_reference": "logistics",
    "sample_logits": "sampling",
    "sample_logits_reference": "sampling",
    "speculative_accept": "speculative",
    "speculative_accept_reference": "speculative",
    "squeeze": "wavelet",
    "squeeze_reference": "wavelet",
    "uniform": "noise",
    "uniform_reference": "noise",
}

# Public operator -> the kernels it calls, by their names in csrc/operators.h.
OPERATORS = {
    "affine": ("affine_forward", "affine_inverse", "affine_backward"),
    "append_cached": ("append_cached",),
    "attend_cached": ("attend_cached",),
    "cubic_spline": ("piecewise_spline_forward", "piecewise_spline_inverse", "piecewise_spline_backward"),
    "diffusion_step": ("diffusion_step", "diffusion_step_denoised", "diffusion_step_backward"),
    "discretized_logistics_log_prob": ("discretized_logistics_forward", "discretized_logistics_backward"),
    "filter_logits": ("filter_logits",),
    "haar": ("wavelet_forward", "wavelet_inverse"),
    "incremental_advance": ("incremental_advance",),
    "linear_spline": ("piecewise_spline_forward", "piecewise_spline_inverse", "piecewise_spline_backward"),
    "logistic_mixture": ("logistic_mixture_forward", "logistic_mixture_inverse", "logistic_mixture_backward"),
    "masked_inverse": ("masked_affine_inverse", "masked_spline_inverse", "masked_backward"),
    "noise": ("noise",),
    "quadratic_spline": ("piecewise_spline_forward", "piecewise_spline_inverse", "piecewise_spline_backward"),
    "rational_quadratic_spline": (
        "rational_quadratic_spline_forward",
        "rational_quadratic_spline_inverse",
        "rational_quadratic_spline_backward",
    ),
    "sample_discretized_logistics": ("discretized_logistics_sample",),
    "sample_logits": ("sample_logits",),
    "speculative_accept": ("speculative_accept",),
    "squeeze": ("wavelet_forward", "wavelet_inverse"),
    "uniform": ("noise",),
}

__all__ = [
    "OPERATORS",
    "MaskedAffine",
    "MaskedNetwork",
    "MaskedSpline",
    "Rotary",
    "affine",
    "affine_reference",
    "append_cached",
    "append_cached_reference",
    "attend_cached",
    "attend_cached_reference",
    "cubic_spline",
    "cubic_spline_reference",
    "diffusion_step",
    "diffusion_step_reference",
    "discretized_logistics_log_prob",
    "discretized_logistics_log_prob_reference",
    "filter_logits",
    "filter_logits_reference",
    "haar",
    "haar_reference",
    "incremental_advance",
    "incremental_advance_reference",
    "linear_spline",
    "linear_spline_reference",
    "logistic_mixture",
    "logistic_mixture_reference",
    "masked_inverse",
    "masked_inverse_reference",
    "noise",
    "noise_reference",
    "quadratic_spline",
    "quadratic_spline_reference",
    "rational_quadratic_spline",
    "rational_quadratic_spline_reference",
    "rotary_tables",
    "rotary_tables_2d",
    "sample_discretized_logistics",
    "sample_discretized_logistics_reference",
    "sample_logits",
    "sample_logits_reference",
    "speculative_accept",
    "speculative_accept_reference",
    "squeeze",
    "squeeze_reference",
    "uniform",
    "uniform_reference",
]


def __getattr__(name: str) -> Any:
    if name not in _FAMILY_OF:
        raise AttributeError(f"module 'pygen.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pygen.ops.{_FAMILY_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

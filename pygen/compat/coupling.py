"""The coupling layer of nflows, which normflows took over: split by index, transform one part, merge.

`transform_net` maps the kept features to the parameters of the moved ones; `unconditional_transform`, where there is
one, transforms the kept features by themselves (Durkan et al. 2019, Neural Spline Flows, arXiv:1906.04032, eq. 9-11).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (layer, moved (n, m, ...), parameters (n, m P, ...), inverse) -> (moved, ladj (n,))
Elementwise = Callable[[Any, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def couple(
    layer: Any, x: Tensor, context: Tensor | None, elementwise: Elementwise, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """x (n, c) or (n, c, height, width) through a coupling layer of either library -> y like x, ladj (n,)."""
    if x.dim() not in (2, 4):
        raise ValueError(f"inputs has {x.dim()} dimensions, but expected 2 or 4")
    if x.shape[1] != layer.features:
        raise ValueError(f"inputs has {x.shape[1]} features, but expected {layer.features}")
    kept, moved = x[:, layer.identity_features], x[:, layer.transform_features]
    alone = layer.unconditional_transform
    ladj_kept: Tensor | None = None
    if inverse and alone is not None:
        kept, ladj_kept = alone.inverse(kept, context)
    moved, ladj = elementwise(layer, moved, layer.transform_net(kept, context), inverse)
    if not inverse and alone is not None:
        kept, ladj_kept = alone(kept, context)
    if ladj_kept is not None:
        ladj = ladj + ladj_kept
    y = torch.empty_like(x)
    y[:, layer.identity_features] = kept
    y[:, layer.transform_features] = moved
    return y, ladj


def per_element(parameters: Tensor, x: Tensor) -> Tensor:
    """(n, c P, ...) -> (n, c, ..., P), the parameters of each element of x (n, c, ...) together. A view."""
    split = parameters.reshape(*x.shape[:2], parameters.shape[1] // x.shape[1], *x.shape[2:])
    return split.movedim(2, -1)

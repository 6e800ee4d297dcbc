"""The coupling layer of nflows, which normflows took over: split by index, transform one part, merge.

`transform_net` maps the kept features to the parameters of the moved ones; `unconditional_transform`, where there is
one, transforms the kept features by themselves (Durkan et al. 2019, Neural Spline Flows, arXiv:1906.04032, eq. 9-11).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen.ops.kept import Kept

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
    split = _split_of(layer)
    kept, moved = split.take(x)
    alone = layer.unconditional_transform
    ladj_kept: Tensor | None = None
    if inverse and alone is not None:
        kept, ladj_kept = alone.inverse(kept, context)
    moved, ladj = elementwise(layer, moved, layer.transform_net(kept, context), inverse)
    if not inverse and alone is not None:
        kept, ladj_kept = alone(kept, context)
    if ladj_kept is not None:
        ladj = ladj + ladj_kept
    return split.put(kept, moved), ladj


def per_element(parameters: Tensor, x: Tensor) -> Tensor:
    """(n, c P, ...) -> (n, c, ..., P), the parameters of each element of x (n, c, ...) together. A view."""
    split = parameters.reshape(*x.shape[:2], parameters.shape[1] // x.shape[1], *x.shape[2:])
    return split if x.dim() == 2 else split.movedim(2, -1)


@dataclasses.dataclass(frozen=True)
class _Split:
    """Which features are kept and which are moved: as slices, so that taking them is a view, where they are regular."""

    kept: slice | Tensor
    moved: slice | Tensor
    order: Tensor  # position in [kept | moved] of each feature
    join: str

    @staticmethod
    def of(kept: Tensor, moved: Tensor) -> _Split:
        order = torch.argsort(torch.cat((kept, moved)))
        of_kept, of_moved, places = kept.tolist(), moved.tolist(), order.tolist()
        half = len(of_kept)
        join = "gather"
        if places == list(range(len(places))):
            join = "kept first"
        elif of_moved + of_kept == list(range(len(places))):
            join = "moved first"
        elif half == len(of_moved) and of_kept == list(range(0, 2 * half, 2)):
            join = "kept even"
        elif half == len(of_moved) and of_moved == list(range(0, 2 * half, 2)):
            join = "moved even"
        return _Split(_regular(of_kept, kept), _regular(of_moved, moved), order, join)

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, c, ...) -> what is kept of it, and what is moved."""
        return _take(x, self.kept), _take(x, self.moved)

    def put(self, kept: Tensor, moved: Tensor) -> Tensor:
        """The inverse of `take`."""
        if self.join.startswith("moved"):
            kept, moved = moved, kept
        if self.join.endswith("even"):
            return torch.stack((kept, moved), 2).flatten(1, 2)
        joined = torch.cat((kept, moved), 1)
        return joined.index_select(1, self.order) if self.join == "gather" else joined


_splits: Kept[_Split] = Kept()


def _split_of(layer: Any) -> _Split:
    kept, moved = layer.identity_features, layer.transform_features
    if torch.compiler.is_compiling():  # a tracer cannot look at the indices
        return _Split(kept, moved, torch.argsort(torch.cat((kept, moved))), "gather")
    return _splits.get_of_buffers(layer, (kept, moved), lambda: _Split.of(kept, moved))


def _take(x: Tensor, features: slice | Tensor) -> Tensor:
    return x[:, features] if isinstance(features, slice) else x.index_select(1, features)


def _regular(features: list[int], index: Tensor) -> slice | Tensor:
    if not features:
        return slice(0, 0)
    step = features[1] - features[0] if len(features) > 1 else 1
    if step < 1 or features != list(range(features[0], features[-1] + 1, step)):
        return index
    return slice(features[0], features[-1] + 1, step)

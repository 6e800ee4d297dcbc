"""Stand-ins for the affine couplings of normflows (`normflows.flows.affine.coupling`, `.reshape`).

Parameters are interleaved, [t | u] by channel: shift 0::2, scale 1::2. Scale maps, of the direction that samples:
"exp" s = e^u; "sigmoid_inv" s = sigmoid(u + 2); "sigmoid" s = 1 / sigmoid(u + 2) = 1 + e^(-u - 2).
"""

from __future__ import annotations

from typing import Any

import torch
from normflows.flows import reshape
from normflows.flows.affine import coupling
from torch import Tensor

from pygen import ops


class AffineCoupling(coupling.AffineCoupling):
    """`normflows.flows.AffineCoupling`."""

    def forward(self, z: Any) -> Any:
        return _couple(self, z, inverse=False)

    def inverse(self, z: Any) -> Any:
        return _couple(self, z, inverse=True)


class MaskedAffineFlow(coupling.MaskedAffineFlow):
    """`normflows.flows.MaskedAffineFlow`."""

    def forward(self, z: Tensor) -> Any:
        return _couple_masked(self, z, inverse=False)

    def inverse(self, z: Tensor) -> Any:
        return _couple_masked(self, z, inverse=True)


class Split(reshape.Split):
    """`normflows.flows.Split`."""

    def forward(self, z: Tensor) -> Any:
        return _split(self.mode, z)

    def inverse(self, z: Any) -> Any:
        return _merge(self.mode, z)


class Merge(reshape.Merge):
    """`normflows.flows.Merge`."""

    def forward(self, z: Any) -> Any:
        return _merge(self.mode, z)

    def inverse(self, z: Tensor) -> Any:
        return _split(self.mode, z)


LAYERS = {
    coupling.AffineCoupling: AffineCoupling,
    coupling.MaskedAffineFlow: MaskedAffineFlow,
    reshape.Split: Split,
    reshape.Merge: Merge,
}

SPLIT_MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv")


def _couple(layer: Any, z: Any, inverse: bool) -> Any:
    kept, moved = z
    parameters = layer.param_map(kept)
    event_dims = moved.dim() - 1
    if not layer.scale:
        moved, ladj = ops.affine(moved, None, parameters, event_dims=event_dims, inverse=inverse)
        return [kept, moved], ladj
    shift, raw_scale = parameters[:, 0::2], parameters[:, 1::2]
    options: dict[str, Any] = {}
    if layer.scale_map == "sigmoid":
        raw_scale, options = -raw_scale, {"offset": -2.0, "epsilon": 1.0}
    elif layer.scale_map == "sigmoid_inv":
        options = {"activation": "sigmoid", "offset": 2.0}
    elif layer.scale_map != "exp":
        raise NotImplementedError(f"scale_map is {layer.scale_map!r}, but expected one of {', '.join(SCALE_MAPS)}")
    moved, ladj = ops.affine(moved, raw_scale, shift, event_dims=event_dims, inverse=inverse, **options)
    return [kept, moved], ladj


def _couple_masked(layer: Any, z: Tensor, inverse: bool) -> Any:
    kept, moves = layer.b * z, 1 - layer.b
    # A layer made without one of the networks has `torch.zeros_like` in its place.
    raw_scale = None if layer.s is torch.zeros_like else layer.s(kept) * moves
    shift = None if layer.t is torch.zeros_like else layer.t(kept) * moves
    return ops.affine(z, raw_scale, shift, event_dims=z.dim() - 1, inverse=inverse)


def _split(mode: str, z: Tensor) -> Any:
    if mode in ("channel", "channel_inv"):
        first, second = z.chunk(2, dim=1)
    elif "checkerboard" in mode:
        pairs = z.unflatten(-1, (-1, 2))
        flip = _odd_rows(z)
        first, second = (torch.where(flip, pairs[..., i], pairs[..., 1 - i]) for i in (0, 1))
    else:
        raise NotImplementedError(f"mode is {mode!r}, but expected one of {', '.join(SPLIT_MODES)}")
    return [second, first] if "inv" in mode else [first, second], 0


def _merge(mode: str, z: Any) -> Any:
    first, second = reversed(z) if "inv" in mode else z
    if mode in ("channel", "channel_inv"):
        return torch.cat((first, second), 1), 0
    if "checkerboard" not in mode:
        raise NotImplementedError(f"mode is {mode!r}, but expected one of {', '.join(SPLIT_MODES)}")
    flip = _odd_rows(first)
    pairs = torch.where(flip, first, second), torch.where(flip, second, first)
    return torch.stack(pairs, -1).flatten(-2), 0


def _odd_rows(z: Tensor) -> Tensor:
    """(*z.shape[1:-1], 1): whether the indices of a row, which is along z's last dimension, add to an odd number."""
    odd = torch.zeros(1, dtype=torch.bool, device=z.device)
    for size in z.shape[1:-1]:
        odd = odd.unsqueeze(-2) ^ (torch.arange(size, device=z.device) % 2 == 1).unsqueeze(-1)
    return odd

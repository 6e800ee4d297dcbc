"""Masked autoregressive flows and inverse autoregressive flows: stacks of affine maps whose scale and shift for each
value a masked network reads off the values before it, in an order that reverses from layer to layer.

MAF: z_i = x_i e^{u_i} + t_i with (u, t) of x_<i: the density takes one pass of each network, a sample one sweep
(Papamakarios et al. 2017, arXiv:1705.07057, eq. 3-5). IAF: x_i = z_i sigmoid(u_i + 2) + t_i with (u, t) of z_<i: the
other way round (Kingma et al. 2016, arXiv:1606.04934, eq. 10-14). Where MAF has batch norm between its layers (section
3.4), an activation normalization stands here, which treats a row alike in any batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from pygen.flows.autoregressive import MaskedAutoregressive
from pygen.flows.base import StandardNormal
from pygen.flows.flow import Flow
from pygen.flows.normalization import ActNorm
from pygen.flows.pictures import PictureFlow, PictureFlowConfig, flat_flow
from pygen.flows.transform import Inverse, Step, Transform
from pygen.nn.made import MADE
from pygen.ops.masked import MaskedAffine


def masked_autoregressive_flow(
    features: int,
    *,
    layers: int = 5,
    hidden: int = 512,
    depth: int = 2,
    context: int = 0,
    classes: int | None = None,
    memory: str = "store",
) -> Flow:
    """A density of rows (n, features), such as of a table; its defaults are those of the paper's MAF (5).

    Args:
        features: values in a row.
        layers: layers of the flow.
        hidden, depth: units of each hidden layer of a masked network, and how many hidden layers it has.
        context: length of a context (n, context) of features that the density is conditioned on; or
        classes: number of labels, for a context int64 (n,).
        memory: what training keeps, see `Stack`.

    Returns:
        A `Flow` with a standard normal base; `log_prob` is a pass of each network, `sample` a sweep.

    ValueError: a number is out of its range.
    """
    steps = _steps(features, layers, hidden, depth, context, classes, lambda made: MaskedAutoregressive(made))
    return Flow(steps, StandardNormal(features), memory=memory)


def inverse_autoregressive_flow(
    features: int,
    *,
    layers: int = 5,
    hidden: int = 512,
    depth: int = 2,
    context: int = 0,
    classes: int | None = None,
    memory: str = "store",
) -> Flow:
    """A flow whose samples, with their density, take a pass of each network: a posterior, or a proposal. The density of
    any other row takes a sweep.

    The arguments are those of `masked_autoregressive_flow`.
    """
    gate = MaskedAffine(activation="sigmoid", offset=2.0)
    steps = _steps(
        features, layers, hidden, depth, context, classes, lambda made: Inverse(MaskedAutoregressive(made, gate))
    )
    return Flow(steps, StandardNormal(features), memory=memory)


def _steps(
    features: int,
    layers: int,
    hidden: int,
    depth: int,
    context: int,
    classes: int | None,
    transform: Callable[[MADE], Transform],
) -> Iterator[Transform]:
    if depth < 1:
        raise ValueError(f"depth is {depth}, but expected at least 1")
    for k in range(layers):
        order = range(features) if k % 2 == 0 else range(features - 1, -1, -1)
        made = MADE(
            features, width=hidden, blocks=depth - 1, residual=False, context=context, classes=classes, order=order
        )
        yield Step([ActNorm(features), transform(made)], "masked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAFConfig(PictureFlowConfig):
    """What a masked autoregressive flow is made of.

    layers: each with its masked network; the order of the values reverses from one to the next.
    hidden, depth: units of each hidden layer of a network, and how many hidden layers it has.
    """

    layers: int = 5
    hidden: int = 512
    depth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layers", "hidden", "depth")


class MAF(PictureFlow):
    """An exact density in one pass of each network, over the picture's values in raster order and against it."""

    config: MAFConfig
    builder = staticmethod(masked_autoregressive_flow)

    def __init__(self, config: MAFConfig | None = None) -> None:
        config = config or MAFConfig()
        flow = self.builder(
            config.dimensions, layers=config.layers, hidden=config.hidden, depth=config.depth, classes=config.classes
        )
        super().__init__(config, flat_flow(config, flow.transform, StandardNormal(config.shape)))


class IAF(MAF):
    """An exact density whose samples take one pass of each network; training takes the sweeps."""

    builder = staticmethod(inverse_autoregressive_flow)

"""Neural spline flows: monotone rational-quadratic splines whose knots a residual network proposes.

Each layer is a permutation, a linear map with an LU-decomposed matrix, and splines on [-bound, bound] that are the
identity outside. Half of the values give the splines of the other half, RQ-NSF (C), or the values before one give its
spline, RQ-NSF (AR) (Durkan et al. 2019, arXiv:1906.04032, sections 3.1, 4.1 and 5.1).
"""

from __future__ import annotations

import dataclasses
import math

from pygen.flows.autoregressive import MaskedAutoregressive
from pygen.flows.base import StandardNormal
from pygen.flows.coupling import SplineCoupling, spline_parameters
from pygen.flows.flow import Flow
from pygen.flows.linear import InvertibleLinear
from pygen.flows.permutation import Permutation
from pygen.flows.pictures import PictureFlow, PictureFlowConfig, flat_flow
from pygen.flows.transform import Step, Transform
from pygen.nn.dense import ResidualMLP
from pygen.nn.made import MADE
from pygen.ops.masked import MaskedSpline


def neural_spline_flow(
    features: int,
    *,
    layers: int = 10,
    hidden: int = 256,
    blocks: int = 2,
    bins: int = 8,
    bound: float = 3.0,
    dropout: float = 0.0,
    autoregressive: bool = False,
    context: int = 0,
    classes: int | None = None,
    memory: str = "store",
) -> Flow:
    """A density of rows (n, features), such as of a table; its defaults are the paper's for POWER and GAS.

    Scale the columns to mean 0 and deviation 1 or so: what is outside [-bound, bound] is only mixed linearly.

    Args:
        features: values in a row, at least two.
        layers: layers of the flow.
        hidden, blocks, dropout: of each layer's network, a residual perceptron; masked networks have no dropout.
        bins, bound: of the splines.
        autoregressive: masked networks in place of couplings: more is learned in a layer, and a sample takes a sweep.
        context: length of a context (n, context) of features that the density is conditioned on; or
        classes: number of labels, for a context int64 (n,).
        memory: what training keeps, see `Stack`.

    Returns:
        A `Flow` with a standard normal base.

    ValueError: a number is out of its range.
    """
    if features < 2:
        raise ValueError(f"features is {features}, but expected at least 2")
    if autoregressive and dropout > 0:
        raise ValueError(f"dropout is {dropout}, but expected 0: masked networks have none")

    def coupling() -> Transform:
        kept, moved = (features + 1) // 2, features // 2
        network = ResidualMLP(
            kept,
            moved * spline_parameters(bins, "linear"),
            width=hidden,
            blocks=blocks,
            dropout=dropout,
            context=context,
            classes=classes,
        )
        return SplineCoupling(network, bins=bins, bound=bound, scale=1 / math.sqrt(hidden))

    def masked() -> Transform:
        spline = MaskedSpline(
            bins, tails="linear", domain=(-bound, bound), identity_init=True, scale=1 / math.sqrt(hidden)
        )
        made = MADE(features, width=hidden, blocks=blocks, per_input=spline.per_input, context=context, classes=classes)
        return MaskedAutoregressive(made, spline)

    def step(k: int) -> Transform:
        mixing = [Permutation.random(features, seed=k), InvertibleLinear(features, start="identity", bias=True)]
        return Step([*mixing, masked() if autoregressive else coupling()], "splines")

    return Flow([step(k) for k in range(layers)], StandardNormal(features), memory=memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuralSplineFlowConfig(PictureFlowConfig):
    """What a neural spline flow is made of.

    layers: each with its permutation, linear map and splines.
    hidden, blocks, dropout: width, residual blocks and dropout of each layer's network.
    bins, bound: of the splines, which are the identity outside [-bound, bound].
    """

    layers: int = 10
    hidden: int = 256
    blocks: int = 2
    dropout: float = 0.0
    bins: int = 8
    bound: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layers", "hidden", "blocks")
        self.require_probability("dropout")
        if self.bins < 2:
            raise ValueError(f"bins is {self.bins}, but expected at least 2")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound is {self.bound}, but expected a positive number")
        if self.dimensions < 2:
            raise ValueError(f"shape is {self.shape}, but expected at least two values")


class NeuralSplineFlow(PictureFlow):
    """An exact density by spline couplings of the picture's values as one vector."""

    config: NeuralSplineFlowConfig
    autoregressive = False

    def __init__(self, config: NeuralSplineFlowConfig | None = None) -> None:
        config = config or NeuralSplineFlowConfig()
        flow = neural_spline_flow(
            config.dimensions,
            layers=config.layers,
            hidden=config.hidden,
            blocks=config.blocks,
            bins=config.bins,
            bound=config.bound,
            dropout=config.dropout,
            autoregressive=self.autoregressive,
            classes=config.classes,
        )
        super().__init__(config, flat_flow(config, flow.transform, StandardNormal(config.shape)))


class AutoregressiveSplineFlow(NeuralSplineFlow):
    """An exact density by splines of each value given those before it; a sample takes a sweep of each layer."""

    autoregressive = True

"""The objectives of adversarial training and their gradient penalties.

With D the discriminator's raw score, r = D(real) and f = D(fake), every objective is a pair of means to descend on
(sources by their arXiv numbers):

    name            discriminator                      generator                source
    relativistic    softplus(f - r)                    softplus(r - f)          Jolicoeur-Martineau 2018, 1807.00734
    minimax         softplus(-r) + softplus(f)         -softplus(f)             Goodfellow et al. 2014, 1406.2661, eq. 1
    non_saturating  softplus(-r) + softplus(f)         softplus(-f)             Goodfellow et al. 2014, section 3
    hinge           relu(1 - r) + relu(1 + f)          -f                       Lim and Ye 2017, 1705.02894
    least_squares   ((r - 1)^2 + f^2) / 2              (f - 1)^2 / 2            Mao et al. 2017, 1611.04076, eq. 9
    wgan_gp         f - r + penalty                    -f                       Gulrajani et al. 2017, 1704.00028
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from pygen.nn.residual import widen

Objective = Literal["relativistic", "minimax", "non_saturating", "hinge", "least_squares", "wgan_gp"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class Penalties(NamedTuple):
    """Weights of the gradient penalties on the discriminator."""

    r1: float = 0.0  # on real pictures
    r2: float = 0.0  # on generated pictures
    gp: float = 0.0  # between the two, towards a norm of one


def default_penalties(objective: Objective) -> Penalties:
    """The weights that an objective is used with where the caller names none."""
    match objective:
        case "relativistic":
            return Penalties(r1=0.1, r2=0.1)
        case "non_saturating":
            return Penalties(r1=0.1)
        case "wgan_gp":
            return Penalties(gp=10.0)
        case _:
            return Penalties()


def discriminator_loss(objective: Objective, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator descends on, penalties apart; scores (n,) of real and generated pictures to a scalar."""
    match objective:
        case "relativistic":
            return softplus(fake - real).mean()
        case "minimax" | "non_saturating":
            return (softplus(-real) + softplus(fake)).mean()
        case "hinge":
            return (relu(1 - real) + relu(1 + fake)).mean()
        case "least_squares":
            return ((real - 1).square() + fake.square()).mean() / 2
        case "wgan_gp":
            return (fake - real).mean()


def generator_loss(objective: Objective, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """What the generator descends on; scores (n,) of generated pictures to a scalar.

    real: (n,), read by the relativistic objective alone.
    """
    match objective:
        case "relativistic":
            if real is None:
                raise ValueError("real is None, but the relativistic objective needs scores (n,) of real pictures")
            return softplus(real - fake).mean()
        case "minimax":
            return -softplus(fake).mean()
        case "non_saturating":
            return softplus(-fake).mean()
        case "hinge" | "wgan_gp":
            return -fake.mean()
        case "least_squares":
            return (fake - 1).square().mean() / 2


def score_and_gradient(score: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n,) and their gradient in the pictures x (n, ...), itself differentiable in the parameters of `score`.

    Each score may depend on its own picture only. torch.func.vjp is used where torch.autograd.grad(create_graph=True)
    would do in eager mode: torch.compile traces the first into its forward graph and refuses the second.
    """
    scores, pullback = torch.func.vjp(score, x)[:2]
    (gradient,) = pullback(torch.ones_like(scores))
    return scores, gradient


def zero_centred(gradient: Tensor) -> Tensor:
    """E ||gradient||^2 / 2: R1 on real pictures, R2 on generated ones (Mescheder et al. 2018, arXiv:1801.04406, eq. 9).

    gradient: (n, ...) of the scores in the pictures.
    """
    return widen(gradient).flatten(1).square().sum(1).mean() / 2


def one_centred(gradient: Tensor) -> Tensor:
    """E (||gradient|| - 1)^2 (Gulrajani et al. 2017, arXiv:1704.00028, eq. 3); gradient (n, ...)."""
    # The norm has no gradient at zero; 1e-12 under the root gives it one without moving it elsewhere.
    norm = (widen(gradient).flatten(1).square().sum(1) + 1e-12).sqrt()
    return (norm - 1).square().mean()

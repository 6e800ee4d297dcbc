"""A normalizing flow: log p(x) = log p_base(f(x)) + log |det df/dx|.

(Rezende & Mohamed 2015, arXiv:1505.05770, eq. 7; Papamakarios et al. 2021, arXiv:1912.02762, eq. 6)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from pygen.flows.base import Base
from pygen.flows.transform import Stack, Transform


class Flow(nn.Module):
    """A density over tensors (n, ...), exact, with samples in one pass back.

    transforms: one, or several in the order from data to the prior.
    base: the distribution of z = f(x): a `Base`, or another `Flow`.
    memory, tolerance: what training keeps, see `Stack`; for a single transform that is not a list, as it is built.

    Everything takes a context, n rows of whatever the conditioners and the base understand. Sampling is
    reparametrised: under autograd, gradients reach the parameters.
    """

    def __init__(
        self,
        transforms: Transform | Iterable[Transform],
        base: Base | Flow,
        *,
        memory: str = "store",
        tolerance: float | None = 1e-3,
    ) -> None:
        super().__init__()
        if not isinstance(transforms, Transform):
            transforms = Stack(transforms, memory=memory, tolerance=tolerance)
        self.transform: Transform = transforms
        self.base = base

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats, (n,)."""
        z, ladj = self.transform(x, context)
        return self.base.log_prob(z, context) + ladj

    def sample(self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0) -> Tensor:
        """n samples, (n, ...). Number `ids[i]` (0 .. n-1 by default) under `seed` is the same in any batch."""
        return self.decode(self._prior(n, context, ids, seed), context)

    def sample_and_log_prob(
        self, n: int, *, context: Tensor | None = None, ids: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """n samples, and log p of each, (n,), from the one pass that made them."""
        z = self._prior(n, context, ids, seed)
        x, ladj = self.transform.inverse(z, context)
        return x, self.base.log_prob(z, context) - ladj

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The prior point of x."""
        return self.transform(x, context)[0]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data point of z."""
        return self.transform.inverse(z, context)[0]

    def _prior(self, n: int, context: Tensor | None, ids: Tensor | None, seed: int) -> Tensor:
        if context is not None and len(context) != n:
            raise ValueError(f"context has {len(context)} rows, but expected one for each of the {n} samples")
        return self.base.sample(n, context=context, ids=ids, seed=seed)

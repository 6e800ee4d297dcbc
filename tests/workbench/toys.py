"""Two tiny models behind the contract: one player with noise, a buffer and tied weights, and one with two players."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pygen.model import Density, GenerativeModel, ModelConfig, Stage
from pygen.workbench.data import Dataset


class Toy(GenerativeModel):
    """x is reconstructed from a noisy copy."""

    density = Density.IMPLICIT

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(config.dimensions, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, config.dimensions)
        self.again = self.last  # the same weights under a second name
        self.dropout = nn.Dropout(0.1)

    def network(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.norm(self.first(x.flatten(1)))))
        result: Tensor = self.last(hidden).view_as(x)
        return result

    def sample(self, n, *, ids=None, condition=None, seed=0, steps=None):  # type: ignore[no-untyped-def]
        return self.network(torch.zeros(n, *self.config.shape))

    def trajectory(self, n, *, ids=None, condition=None, seed=0, steps=None):  # type: ignore[no-untyped-def]
        return [Stage("X", self.sample(n))]

    def network_passes(self, steps: int | None = None) -> int:
        return 1

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        return (self.network(x + torch.randn_like(x)) - x).square().mean()


class Duel(Toy):
    """The critic tells x from what the network makes of noise; `asked` remembers who was asked, with which batch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.critic = nn.Linear(config.dimensions, 1)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.asked: list[tuple[str, Tensor, dict[str, bool]]] = []

    def players(self) -> dict[str, list[nn.Parameter]]:
        own = [*self.first.parameters(), *self.norm.parameters(), *self.last.parameters(), self.frozen]
        return {"critic": list(self.critic.parameters()), "forger": own}

    def loss(self, x: Tensor, *, player: str = "model", condition: Tensor | None = None) -> Tensor:
        needs = {"critic": self.critic.weight.requires_grad, "forger": self.last.weight.requires_grad}
        self.asked.append((player, x.clone(), needs))
        made = self.network(torch.randn_like(x))
        gap = (self.critic(made.flatten(1)) - self.critic(x.flatten(1))).mean()
        return (gap + 0.1 * self.critic.weight.square().sum()) if player == "critic" else -gap


def pictures(n: int = 23, classes: int | None = 3) -> Dataset:
    """A few random pictures of 1 x 2 x 3 in 5 levels."""
    generator = torch.Generator().manual_seed(1)
    return Dataset(
        name="toys",
        pictures=torch.randint(5, (n, 1, 2, 3), generator=generator, dtype=torch.uint8),
        labels=None if classes is None else torch.arange(n) % classes,
        levels=5,
        classes=classes,
    )


def build(kind: type[Toy]) -> Toy:
    """A toy for `pictures()`, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(ModelConfig(shape=(1, 2, 3), levels=5, classes=3))

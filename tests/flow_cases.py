"""Small couplings that tests of flows are built of."""

from __future__ import annotations

from torch import Tensor, nn

from pygen.flows import AffineCoupling, Transform


class Conditioner(nn.Module):
    """A small net with dropout and batch norm, and a context that is added."""

    def __init__(self, kept: int, moved: int, *, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(kept, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.context = nn.Linear(2, 16)
        self.second = nn.Linear(16, 2 * moved)

    def forward(self, kept: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.first(kept)
        if context is not None:
            hidden = hidden + self.context(context)
        return self.second(self.dropout(self.norm(hidden).tanh()))


def couplings(depth: int, channels: int = 4, **options: object) -> list[Transform]:
    low, high = channels // 2, (channels + 1) // 2
    return [
        AffineCoupling(Conditioner(*((low, high) if k % 2 else (high, low)), **options), flip=k % 2 == 1)
        for k in range(depth)
    ]


# Each recipe as small as it can be and still have all its parts.
SMALL_RECIPES: dict[str, dict[str, object]] = {
    "realnvp": {"couplings": 2, "width": 4},
    "nice": {"couplings": 2, "width": 8, "layers": 2},
    "glow": {"scales": 2, "steps": 2, "width": 4},
    "maf": {"layers": 2, "hidden": 8},
    "iaf": {"layers": 2, "hidden": 8},
    "nsf": {"layers": 2, "hidden": 8, "blocks": 1, "bins": 4},
    "nsf-ar": {"layers": 2, "hidden": 8, "blocks": 1, "bins": 4},
    "flowpp": {
        "checkerboards": 1, "channels": 1, "coarse": 1, "width": 4, "blocks": 1, "heads": 2, "components": 2,
        "dequantizer_couplings": 1, "dequantizer_blocks": 1,
    },
    "tarflow": {"blocks": 2, "layers": 1, "width": 8, "heads": 2, "dropout": 0.0},
}  # fmt: skip

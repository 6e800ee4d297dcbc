"""What the configurations of the autoregressive models share."""

from __future__ import annotations

import dataclasses

from pygen.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(ModelConfig):
    """What every autoregressive model needs to know of its data: see `ModelConfig`."""

    def require_odd(self, *names: str) -> None:
        """ValueError where one of these fields is no odd number from 3."""
        for name in names:
            value = getattr(self, name)
            if value < 3 or value % 2 == 0:
                raise ValueError(f"{name} is {value}, but expected an odd number from 3")

    def require_colours(self, *names: str) -> None:
        """ValueError where one of these fields is no positive multiple of the picture's channels."""
        for name in names:
            value = getattr(self, name)
            if value < 1 or value % self.shape[0]:
                raise ValueError(f"{name} is {value}, but expected a positive multiple of the {self.shape[0]} channels")

"""What an autoregressive model keeps of the tokens before, so that one more token costs one more token's work.

p(t_0 .. t_{L-1}) = prod_i p(t_i | t_0 .. t_{i-1}): `Stepper.step` takes t_{i-1} and returns the logits of t_i.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from pygen.autoregressive.arguments import check_count, check_tensor

if TYPE_CHECKING:
    from pygen.autoregressive.model import AutoregressiveModel

Self = TypeVar("Self", bound="State")


class State(ABC):
    """The tokens that were fed to a model, in whatever form it needs them, for `rows` samples side by side.

    rows: how many samples. position: how many tokens each has been fed; all have been fed as many.
    length: tokens of a whole sample. Nothing follows the last, so at most length - 1 can be fed.

    A state belongs to the parameters that it was made with: after a training step, start a new one.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self.position = 0
        self._like: Tensor | None = None  # what an empty block gets is like this

    @abstractmethod
    def first(self) -> Tensor:
        """The logits (rows, vocabulary) of the first token; only asked for at position 0."""

    @abstractmethod
    def feed(self, tokens: Tensor) -> Tensor:
        """Take the next tokens, int64 (rows, block) with block >= 1, and return the logits (rows, block, vocabulary)
        of the token after each; `position` is the caller's to move on."""

    @abstractmethod
    def select(self, index: Tensor) -> None:
        """Replace every tensor of the state, and none in place, by its rows at `index`, int64 (m,)."""

    def copy(self: Self) -> Self:
        """A state whose `select` leaves this one as it is."""
        return copy.copy(self)

    def forget(self, position: int) -> None:
        """Drop what was kept of the tokens from `position` on, where they would be read before they are fed again."""
        return

    def advance(self, token: Tensor | None) -> Tensor:
        """`feed` any number of tokens, (rows,) or (rows, block), and move on; or None for `first`. The logits are
        (rows, vocabulary) or (rows, block, vocabulary).

        TypeError: token is not int64. ValueError: it has another shape, or goes beyond the last but one token; or it is
        None, but tokens have been fed.
        """
        if token is None:
            if self.position:
                raise ValueError(
                    f"token is None, but expected int64 tokens at position {self.position}: only the first token has "
                    "none before it"
                )
            return self.first()
        check_tensor("token", token)
        if token.dtype != torch.int64:
            raise TypeError(f"token has dtype {token.dtype}, but expected torch.int64")
        if token.dim() not in (1, 2) or len(token) != self.rows:
            raise ValueError(
                f"token has shape {tuple(token.shape)}, but expected ({self.rows},) or ({self.rows}, block)"
            )
        tokens = token[:, None] if token.dim() == 1 else token
        block = tokens.shape[1]
        if self.position + block >= self.length:
            raise ValueError(
                f"token has {block} tokens after {self.position}, but expected at most {self.length - 1} in all: "
                "nothing follows the last"
            )
        if not block:
            like = self.first()[:, None] if self._like is None else self._like
            return like.new_empty(self.rows, 0, like.shape[2])
        logits = self.feed(tokens)
        self._like = logits.new_empty(0, 0, logits.shape[2])
        self.position += block
        return logits[:, 0] if token.dim() == 1 else logits

    def crop(self, position: int) -> None:
        """Take back the tokens from `position` on, in place; then token number `position` is the next to feed.

        Its logits are not given again: the step that fed the token before had them, and `step(None)` has the first.

        ValueError: position is negative, or more than were fed.
        """
        position = check_count("position", position)
        if position > self.position:
            raise ValueError(f"position is {position}, but expected 0 to {self.position}, as many as were fed")
        self.forget(position)
        self.position = position

    def fork(self: Self, copies: int = 1) -> Self:
        """A state of its own with each row `copies` times: row i becomes rows i * copies .. (i + 1) * copies - 1.

        ValueError: copies is negative.
        """
        copies = check_count("copies", copies)
        forked = self.copy()
        forked.reorder(torch.arange(self.rows).repeat_interleave(copies))
        return forked

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was, in place; index int64 (m,), where m may differ from `rows`.

        TypeError: index is not int64. ValueError: it has another shape, or a row that there is not.
        """
        check_tensor("index", index)
        if index.dtype != torch.int64:
            raise TypeError(f"index has dtype {index.dtype}, but expected torch.int64")
        if index.dim() != 1:
            raise ValueError(f"index has shape {tuple(index.shape)}, but expected (rows,)")
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.rows:
            raise ValueError(
                f"index has rows {int(index.min())} to {int(index.max())}, but expected rows of 0 to {self.rows - 1}"
            )
        self.select(index)
        self.rows = len(index)


class Stepper(Protocol):
    """Whatever can be sampled token by token: what speculative, blockwise and fixed-point sampling ask of a model."""

    @property
    def length(self) -> int:
        """Tokens of a sample."""

    @property
    def vocabulary(self) -> int:
        """Values that a token can have."""

    def start(self, n: int, *, condition: Tensor | None = None) -> State:
        """A state of n rows that no token has been fed to."""

    def step(self, token: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Feed tokens, and get the logits of what comes after each; the state is changed in place, and returned.

        token: int64 (rows,), or (rows, block) for several at once; None, at position 0, for the logits of the first.

        Returns logits (rows, vocabulary), or (rows, block, vocabulary).
        """


class PrefixState(State):
    """The tokens themselves, and the whole network again for each step: for models and devices without a cache.

    tokens: int64 (rows, length), zero where none was fed yet. condition: int64 (rows,), or None.
    outputs: of tokens (rows, length) and the condition, for each token what it is drawn from, (rows, length, ...); by
        default its logits.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        rows: int,
        condition: Tensor | None,
        outputs: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        super().__init__(rows, model.length)
        self.condition = condition
        self._outputs = outputs or (lambda tokens, condition: model.token_logits(tokens, condition=condition))
        self.tokens = torch.zeros(rows, model.length, dtype=torch.int64, device=model.device)

    def first(self) -> Tensor:
        return self._outputs(self.tokens, self.condition)[:, 0]

    def feed(self, tokens: Tensor) -> Tensor:
        end = self.position + tokens.shape[1]
        self.tokens[:, self.position : end] = tokens
        return self._outputs(self.tokens, self.condition)[:, self.position + 1 : end + 1]

    def select(self, index: Tensor) -> None:
        self.tokens = self.tokens[index.to(self.tokens.device)]
        if self.condition is not None:
            self.condition = self.condition[index.to(self.condition.device)]

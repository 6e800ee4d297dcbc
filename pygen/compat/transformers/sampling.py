"""One draw from logits in the place of transformers' processors, softmax and `torch.multinomial`; and the refusal of
logits that are no distribution.

`generate` calls its processors, and then asks for a softmax and a draw, or for the largest. The processors that
`ops.sample_logits` has are not run: a stand-in for what they would return waits for the draw, and becomes it where
anything else is asked of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.generation import logits_process as processors

from pygen import ops

# What the kernel does, in the order in which it does it.
_ORDER = {
    processors.RepetitionPenaltyLogitsProcessor: 0,
    processors.SuppressTokensLogitsProcessor: 1,
    processors.TemperatureLogitsWarper: 2,
    processors.TopKLogitsWarper: 3,
    processors.TopPLogitsWarper: 4,
    processors.MinPLogitsWarper: 5,
    processors.TypicalLogitsWarper: 6,
    processors.LogitNormalization: 7,
}


class Sampler(processors.LogitsProcessorList):
    """The processors of one call of `generate`, the last of which the draw itself does.

    given: the processors, in their order. Those that pygen has not, and what comes before them, run as they are.
    do_sample: whether tokens are drawn. Then PyTorch's default generator gives the seed of all draws: the token of row
        i at step t is that of (seed, sample id i, position t).
    """

    def __init__(self, given: Any, do_sample: bool) -> None:
        super().__init__(one for one in given if not isinstance(one, Refusing))  # an assistant is given its model's
        self.first = _first_of_ours(self)
        self.seed = int(torch.randint(-(2**63), 2**63 - 1, ())) if do_sample else 0
        self.step = -1
        self._allowed: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if kwargs or scores.dim() != 2:
            plain: Tensor = super().__call__(input_ids, scores, **kwargs)
            return plain
        self.step += 1
        for processor in self[: self.first]:
            scores = processor(input_ids, scores)
        undrawn = scores.as_subclass(Undrawn)
        undrawn.sampler, undrawn.input_ids, undrawn.position = self, input_ids, self.step
        return undrawn

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What the processors that the draw does would return."""
        for processor in self[self.first :]:
            scores = processor(input_ids, scores)
        return scores

    def draw(self, input_ids: Tensor, scores: Tensor, position: int, largest: bool) -> Tensor:
        """int64 (rows,): a token for each row of scores (rows, vocabulary), or the one with the largest score.

        ValueError: a row of scores is no distribution; transformers would raise of a row without saying which, and
        take any token as the largest.
        """
        rows = len(scores)
        token, _ = ops.sample_logits(
            scores, seed=self.seed, sample_ids=torch.arange(rows, device=scores.device), position=position,
            **self._options(input_ids, scores, largest),
        )  # fmt: skip
        if rows and int(token.min()) < 0:
            raise ValueError(_refusal(token < 0, position))
        return token

    def _options(self, input_ids: Tensor, scores: Tensor, largest: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"ties": "transformers"}
        for processor in self[self.first :]:
            if isinstance(processor, processors.RepetitionPenaltyLogitsProcessor):
                options["repetition_penalty"] = processor.penalty
                options["history"] = _history(input_ids, processor.prompt_ignore_length)
            elif isinstance(processor, processors.SuppressTokensLogitsProcessor):
                if self._allowed is None:
                    suppressed = processor.suppress_tokens.to(scores.device)
                    self._allowed = ~torch.isin(torch.arange(scores.shape[1], device=scores.device), suppressed)
                options["allowed"] = self._allowed
            elif isinstance(processor, processors.TemperatureLogitsWarper):
                options["temperature"] = processor.temperature
            elif isinstance(processor, processors.TopKLogitsWarper):
                options["top_k"] = processor.top_k
            elif isinstance(processor, processors.TopPLogitsWarper):
                options["top_p"] = processor.top_p
            elif isinstance(processor, processors.MinPLogitsWarper):
                options["min_p"] = processor.min_p
            elif isinstance(processor, processors.TypicalLogitsWarper):
                options["typical_p"] = processor.mass
        return options | {"temperature": 0.0} if largest else options


class Refusing(processors.LogitsProcessor):
    """The last processor where transformers chooses the tokens: scores as they are, unless a row is no distribution.

    start: tokens before step 0. beams: rows that one prompt has; where one of them still goes on, others may end.
    drafted: whether tokens are tried that may not be taken, of which what comes behind them need not have a token.

    ValueError: a NaN or an infinity, of which transformers would take any token; no finite number for a prompt.
    """

    def __init__(self, start: int, beams: int = 1, drafted: bool = False) -> None:
        self._start = start
        self._beams = beams
        self._drafted = drafted
        self._empty: list[tuple[Tensor, str]] = []  # drafts that nothing can follow, and what to say if they are taken

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        largest = scores.amax(1).view(-1, self._beams)
        bad = (largest.isnan() | (largest == torch.inf)).any(1)
        empty = (largest == -torch.inf).all(1)
        if bool((bad | empty).any()):
            message = _refusal(bad | empty, input_ids.shape[1] - self._start)
            if not self._drafted or bool(bad.any()):
                raise ValueError(message)
            self._empty.append((input_ids.clone(), message))
        return scores

    def check(self, taken: Tensor) -> None:
        """Refuse tokens (1, length) that have one where no score was finite."""
        for before, message in self._empty:
            length = before.shape[1]
            if length < taken.shape[1] and torch.equal(taken[:, :length], before):
                raise ValueError(message)


def _refusal(bad: Tensor, step: int) -> str:
    rows = ", ".join(map(str, bad.nonzero().squeeze(1).tolist()))
    return (
        f"logits of row {rows} have a NaN or an infinity, or no finite number, in step {step}, but expected a "
        "distribution to take a token from"
    )


class Undrawn(Tensor):
    """Scores (rows, vocabulary) before the last processors, or the probabilities that they would make.

    A softmax is put off, and a draw, or the largest, is the kernel's. For any other operation the processors are run.
    """

    sampler: Sampler
    input_ids: Tensor
    position: int
    is_probability = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], Undrawn) else None
        if own is not None:
            last = kwargs.get("dim") in (-1, 1)
            if function is F.softmax and last and not own.is_probability and kwargs.get("dtype") is None:
                return own.softmax_later()
            if function is torch.multinomial and own.is_probability and len(args) == 1 and kwargs == {"num_samples": 1}:
                return own.draw(largest=False).unsqueeze(1)
            if function is torch.argmax and last and not own.is_probability and set(kwargs) == {"dim"}:
                return own.draw(largest=True)
        args, kwargs = pytree.tree_map_only(Undrawn, Undrawn.processed, (args, kwargs))
        return function(*args, **kwargs)

    def softmax_later(self) -> Undrawn:
        later = self.scores().as_subclass(Undrawn)
        later.sampler, later.input_ids, later.position = self.sampler, self.input_ids, self.position
        later.is_probability = True
        return later

    def scores(self) -> Tensor:
        """What is here, before the last processors."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def draw(self, largest: bool) -> Tensor:
        return self.sampler.draw(self.input_ids, self.scores(), self.position, largest)

    def processed(self) -> Tensor:
        """What transformers would have here."""
        scores = self.sampler.process(self.input_ids, self.scores())
        return F.softmax(scores, dim=-1) if self.is_probability else scores


def processed(value: Any) -> Any:
    """Outputs of `generate` with ordinary tensors in the place of `Undrawn`."""
    scores = getattr(value, "scores", None)
    if scores is not None:
        value.scores = tuple(one.processed() if isinstance(one, Undrawn) else one for one in scores)
    return value


def _first_of_ours(given: list[Any]) -> int:
    """Where the longest end of a list of processors begins that the kernel does, in its order."""
    first, rank = len(given), len(_ORDER)
    for place in reversed(range(len(given))):
        own = _ORDER.get(type(given[place]))
        if own is None or own >= rank or not _is_served(given[place]):
            break
        first, rank = place, own
    return first


def _is_served(processor: Any) -> bool:
    """Whether the kernel has a processor with the options that it has."""
    if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
        return False
    if isinstance(processor, processors.TopKLogitsWarper):
        return True  # it has its min_tokens_to_keep in its k
    if isinstance(processor, processors.TopPLogitsWarper) and processor.top_p == 0:
        return False
    return bool(getattr(processor, "min_tokens_to_keep", 1) == 1)


def _history(input_ids: Tensor, ignored: int | Tensor | None) -> Tensor:
    """The tokens that count as repeated, -1 in the place of those of the prompt that do not."""
    if ignored is None:
        return input_ids
    if isinstance(ignored, int):
        return input_ids[:, ignored:]
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    return input_ids.masked_fill(place < ignored.to(input_ids.device)[:, None], -1)

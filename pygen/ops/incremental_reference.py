"""The incremental programs in plain PyTorch, one site of one operation at a time: slow, and read without surprise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen.ops.incremental_program import BINARY, KINDS, LANES, NO_TABLE, NOWHERE, PANEL, SPACES, UNARY, Array, Program
from pygen.ops.logistics import sample_discretized_logistics_reference
from pygen.ops.sampling import sample_logits_reference

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "neg": lambda a, b, n: -a,
    "exp": lambda a, b, n: a.exp(),
    "log": lambda a, b, n: a.log(),
    "tanh": lambda a, b, n: a.tanh(),
    "sigmoid": lambda a, b, n: a.sigmoid(),
    "relu": lambda a, b, n: a.relu(),
    "abs": lambda a, b, n: a.abs(),
    "sqrt": lambda a, b, n: a.sqrt(),
    "rsqrt": lambda a, b, n: a.rsqrt(),
    "silu": lambda a, b, n: F.silu(a),
    "gelu": lambda a, b, n: F.gelu(a),
    "gelu_tanh": lambda a, b, n: F.gelu(a, approximate="tanh"),
    "elu": lambda a, b, n: torch.where(a > 0, n[1] * a, n[0] * a.clamp(max=0).expm1()),
    "leaky_relu": lambda a, b, n: torch.where(a > 0, a, n[0] * a),
    "softplus": lambda a, b, n: F.softplus(a, float(n[0]), float(n[1])),
    "clamp": lambda a, b, n: a.clamp(float(n[0]), float(n[1])),
    "scale": lambda a, b, n: a * n[0] + n[1],
    "add": lambda a, b, n: a + b,
    "sub": lambda a, b, n: a - b,
    "mul": lambda a, b, n: a * b,
    "div": lambda a, b, n: a / b,
    "maximum": lambda a, b, n: torch.maximum(a, b),
    "minimum": lambda a, b, n: torch.minimum(a, b),
    "fill": lambda a, b, n: torch.where(a != 0, n[0], b),
}


def _padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


class Executor:
    """One program on the spaces of a batch: state (n, ...), weights (...), conditions (n, ...)."""

    def __init__(self, program: Program, state: Tensor, weights: Tensor, conditions: Tensor) -> None:
        sections = program.sections()
        self.header = program
        self.grids, self.operations = sections["grids"].tolist(), sections["operations"].tolist()
        self.sources, self.instructions = sections["sources"].tolist(), sections["instructions"].tolist()
        self.templates, self.tasks = sections["templates"].tolist(), sections["tasks"].tolist()
        self.steps, (self.draws, self.writes) = sections["steps"].tolist(), sections["draws"].tolist()
        self.tables: Array = sections["tables"]
        self.state, self.weights = state, weights
        self.spaces = dict(zip(SPACES, (state, weights.expand(len(state), -1), conditions), strict=True))

    def address(self, source: list[int], y: int, x: int) -> int | None:
        _, rows, columns, offset, *_ = source
        row, column = int(self.tables[rows + y]), int(self.tables[columns + x])
        return None if NOWHERE in (row, column) else row + column + offset

    def channels(self, source: list[int], y: int, x: int) -> Tensor:
        """(n, channels) at a site."""
        space, _, _, _, count, gather, *_ = source
        at = self.address(source, y, x)
        numbers = self.spaces[SPACES[space]]
        if at is None:
            return numbers.new_zeros(len(numbers), count)
        if gather == NO_TABLE:
            return numbers[:, at : at + count]
        return numbers[:, at + torch.from_numpy(self.tables[gather : gather + count]).long().to(numbers.device)]

    def write(self, index: int, y: int, x: int, numbers: Tensor) -> None:
        at = self.address(self.sources[index], y, x)
        assert at is not None
        self.state[:, at : at + numbers.shape[1]] = numbers

    def run_tasks(self, step: int) -> None:
        template = self.steps[step]
        for task in range(self.templates[template], self.templates[template + 1]):
            number, row, column, count = self.tasks[task]
            height, width = self.grids[self.operations[number][1]]
            y, x = self.site(step)
            y, x = y * height // self.header.height + row, x * width // self.header.width + column
            for i in range(count):
                self.operate(self.operations[number], y, x + i)

    def site(self, step: int) -> tuple[int, int]:
        return divmod(step // self.header.channels, self.header.width)

    def operate(self, operation: list[int], y: int, x: int) -> None:
        kind, _, out, first, count, channels, weights, *_ = operation
        sources = self.sources[first : first + count]
        compute = getattr(self, KINDS[kind])
        self.write(out, y, x, compute(operation, sources, channels, self.weights[weights:], y, x))

    def linear(self, _: Any, sources: list[Any], channels: int, weights: Tensor, y: int, x: int) -> Tensor:
        outputs, inputs = _padded(channels), sum(source[4] for source in sources)
        bias, weights = weights[:outputs], weights[outputs:]
        panels = []
        for at in range(0, outputs, PANEL):
            width = min(PANEL, outputs - at)
            panels.append(weights[: inputs * width].view(inputs, width))
            weights = weights[inputs * width :]
        read = [self.channels(source, y, x) for source in sources] or [self.state[:, :0]]
        return (bias + torch.cat(read, 1) @ torch.cat(panels, 1))[:, :channels]

    def pointwise(self, operation: Any, sources: list[Any], channels: int, _: Tensor, y: int, x: int) -> Tensor:
        first, count = operation[7:9]
        registers = [self.channels(source, y, x) for source in sources]
        for kind, a, b, numbers in self.instructions[first : first + count]:
            function = _FUNCTIONS[(UNARY + BINARY)[kind]]
            registers.append(function(registers[a], registers[b], self.weights[numbers:]))
        return registers[-1]

    def norm(self, _: Any, sources: list[Any], channels: int, weights: Tensor, y: int, x: int) -> Tensor:
        width = _padded(channels)
        numbers = torch.cat([self.channels(source, y, x) for source in sources], 1)
        gain, bias, epsilon = weights[:channels], weights[width : width + channels], float(weights[2 * width])
        return F.layer_norm(numbers, (channels,), gain, bias, epsilon)

    def lookup(self, operation: Any, sources: list[Any], channels: int, weights: Tensor, y: int, x: int) -> Tensor:
        tokens, width = operation[9], _padded(channels)
        token = self.channels(sources[0], y, x)[:, 0]
        valid = (token >= 0) & (token < tokens)
        table = weights[: tokens * width].view(tokens, width)[:, :channels]
        return torch.where(valid[:, None], table[torch.where(valid, token, 0).long()], torch.nan)

    def attention(self, operation: Any, sources: list[Any], channels: int, weights: Tensor, y: int, x: int) -> Tensor:
        heads, first, last = operation[9:12]
        site = y * self.grids[operation[1]][1] + x
        keys = range(int(self.tables[first + site]), int(self.tables[last + site]))
        if not keys:
            return self.state.new_zeros(len(self.state), channels)
        query, key, value = sources
        width = key[7]
        queries = self.channels(query, y, x).unflatten(1, (heads, -1))
        found = [
            torch.stack([self.channels(each, *divmod(k, width)) for k in keys], 1).unflatten(2, (heads, -1))
            for each in (key, value)
        ]
        scores = torch.einsum("nhd,nkhd->nhk", queries, found[0]) * weights[0]
        return torch.einsum("nhk,nkhd->nhd", scores.softmax(-1), found[1]).flatten(1)


def advance(
    state: Tensor, tokens: Tensor, weights: Tensor, program: Program, conditions: Tensor, values: Tensor, *,
    sample_ids: Tensor, seed: int | Tensor, begin: int, end: int, known: Tensor | None, mode: str, logistics: int,
    filters: dict[str, Any], with_logits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `incremental_advance`."""
    run = Executor(program, state, weights, conditions)
    n = len(state)
    log_prob = state.new_zeros(n, end - begin)
    logits = state.new_empty(n, end - begin if with_logits else 0, program.vocabulary)
    for step in range(begin, end):
        if step > 0 and (write := run.writes[(step - 1) % program.channels]) >= 0:
            token = tokens[:, step - 1]
            valid = (token >= 0) & (token < len(values))
            element = torch.where(valid, values[torch.where(valid, token, 0)], torch.nan)
            run.write(write, *run.site(step - 1), element[:, None])
        run.run_tasks(step)
        if mode == "follow" and not with_logits:
            continue
        channel = step % program.channels
        numbers = run.channels(run.sources[run.draws[channel]], *run.site(step))
        if with_logits:
            logits[:, step - begin] = numbers
        if mode == "follow":
            continue
        pixel = tokens[:, step - channel : step + 1]
        if logistics:
            token, chances = _logistics(
                numbers, pixel, seed, sample_ids, step, channel, logistics, mode, program.channels
            )  # fmt: skip
        else:
            token, chances = _categorical(numbers, pixel, seed, sample_ids, step, channel, filters, mode)
        if mode == "draw":
            free = torch.ones(n, dtype=torch.bool, device=state.device) if known is None else ~known[:, step]
            tokens[:, step] = torch.where(free, token, tokens[:, step])
            chances = torch.where(free, chances, 0)
        log_prob[:, step - begin] = chances
    return log_prob, logits


def _categorical(
    numbers: Tensor, pixel: Tensor, seed: int | Tensor, ids: Tensor, step: int, channel: int, filters: dict[str, Any],
    mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if mode == "draw":
        return sample_logits_reference(numbers, seed=seed, sample_ids=ids, position=step, **filters)
    token = pixel[:, channel]
    valid = (token >= 0) & (token < numbers.shape[1])
    chances = numbers.log_softmax(-1).gather(1, torch.where(valid, token, 0)[:, None])[:, 0]
    return token, torch.where(valid, chances, torch.nan)


def _logistics(
    numbers: Tensor, pixel: Tensor, seed: int | Tensor, ids: Tensor, step: int, channel: int, levels: int, mode: str,
    colours: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A level of one colour, given those before; or the probability of the level that is there."""
    given = channel + (mode == "score")
    x = numbers.new_zeros(len(numbers), colours)
    x[:, :given] = 2.0 / (levels - 1) * pixel[:, :given].to(numbers.dtype) - 1
    known = (torch.arange(colours, device=x.device) < given).expand(x.shape)
    drawn, chances = sample_discretized_logistics_reference(
        numbers, seed=seed, sample_ids=ids, position=step - channel, colours=colours, levels=levels, x=x, known=known
    )
    level = ((drawn[:, channel] + 1) * ((levels - 1) / 2)).round()
    return torch.where(level.isnan() | chances[:, channel].isnan(), -1, level).long(), chances[:, channel]

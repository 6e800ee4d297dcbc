"""A goodness-of-fit test of samplers. Its own test, in tests/ops/test_sampling.py, says what it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def fit(tokens: Tensor, probability: Tensor) -> float:
    """p-value of the G-test of tokens against probabilities, bins pooled up to at least ten expected."""
    expected = probability.double() * len(tokens)
    seen = torch.bincount(tokens, minlength=len(expected)).double()
    order = expected.argsort()
    group, filled = torch.zeros(len(order), dtype=torch.int64), 0.0
    for place, token in enumerate(order.tolist()):
        group[token] = group[order[place - 1]] + (filled >= 10) if place else 0
        filled = (0.0 if filled >= 10 else filled) + float(expected[token])
    pooled = [torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, x) for x in (seen, expected)]
    statistic = 2 * torch.special.xlogy(pooled[0], pooled[0] / pooled[1]).sum()
    freedom = torch.tensor((len(pooled[0]) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if freedom > 0 else 1.0

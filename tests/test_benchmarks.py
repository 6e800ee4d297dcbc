"""That a benchmark compares with what its names say."""

from __future__ import annotations

import json
from typing import Any

import torch
from measure import compiled
from run import others
from torch import Tensor


def test_every_case_compiles_its_own_static_graph():
    torch.compiler.reset()
    graphs: list[list[int | Tensor]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[int | Tensor]) -> Any:
        graphs.append(inputs)
        return graph

    def twice(x: Tensor) -> Tensor:
        return 2 * x

    cases = torch._dynamo.config.recompile_limit + 3
    for rows in range(2, 2 + cases):
        own, x = compiled(twice, backend), torch.randn(rows, 5)
        for _ in range(2):
            assert torch.equal(own(x), twice(x))
    assert len(graphs) == cases
    assert all(type(size) is int for inputs in graphs for x in inputs for size in x.shape)


def test_a_family_run_again_leaves_the_others_results(tmp_path):
    path = tmp_path / "machine-day.json"
    assert others(path, ["noise"]) == []
    cases = [{"family": "noise", "name": "a"}, {"family": "cache", "name": "b"}]
    path.write_text(json.dumps({"cases": cases}))
    assert others(path, ["noise"]) == cases[1:]

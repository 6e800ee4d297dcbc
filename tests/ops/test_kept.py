"""What tells that parameters have changed: a write through `.data` moves no version, and has to be seen even so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pygen.ops.kept import Kept, probes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def changed(element: Tensor) -> Tensor:
    return ~element if element.dtype == torch.bool else element * 1.01 + (not element.is_floating_point())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_write_to_any_one_element_is_seen(dtype: torch.dtype) -> None:
    values = torch.randn(40, 7) if dtype.is_floating_point else torch.randint(2, (40, 7))
    for tensor in (values.to(dtype), values.to(dtype).t()):
        seen = probes([tensor], whole=True)
        for row in (0, 1, 6):
            for column in range(7):
                before = tensor[row, column].clone()
                tensor[row, column] = changed(before)
                assert probes([tensor], whole=True) != seen
                tensor[row, column] = before
        assert probes([tensor], whole=True) == seen


@pytest.mark.parametrize("change", [torch.neg, torch.exp2, lambda x: 2 * x, torch.zeros_like])
def test_a_write_to_all_elements_is_seen(change) -> None:
    tensor = torch.randn(64, 64)
    assert probes([change(tensor)], whole=True) != probes([tensor], whole=True)


def test_a_value_is_made_again_after_a_write_that_moves_no_version() -> None:
    layer, kept = nn.Linear(30, 30), Kept[object](whole=True)
    with torch.no_grad():
        first = kept.get(layer, list(layer.parameters()), object)
        assert kept.get(layer, list(layer.parameters()), object) is first
        layer.weight.data[3, 4] = 50.0
        assert kept.get(layer, list(layer.parameters()), object) is not first

"""The examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def test_there_is_one_example_of_each_use():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=["kernel", "layer", "model"])
def test_example(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "example"})

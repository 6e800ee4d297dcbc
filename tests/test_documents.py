"""The examples of the README and of the pages under docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(path, block, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), start=1)
]


def test_the_readme_has_one_example_of_each_use():
    assert sum(block.values[0].name == "README.md" for block in BLOCKS) == 4


@pytest.mark.parametrize(("path", "block"), BLOCKS)
def test_example(path, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, path.name, "exec"), {"__name__": "example"})

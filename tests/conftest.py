"""Backends, and property tests: fresh examples at each run, the same ones where CI is set.

`--backend` names the backends that operator tests run on: `cpu`, `simt` (the CUDA sources on the CPU, built by
`cmake --build --preset simt`) and `cuda`. A backend that was asked for and is missing is an error, never a skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from pygen import _native

REPOSITORY = Path(__file__).parent.parent
SIMT_LIBRARY = Path(os.environ.get("PYGEN_LIBRARIES", REPOSITORY / "build/simt")) / "libpygen_simt.so"

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


if " " in torch.__file__:
    # PyTorch's inductor does not quote the paths that it gives the compiler: where there is a space in them the graphs
    # are traced, and run without generated code.
    _compile = torch.compile

    def _compile_without_code(model: Any = None, *, backend: str = "aot_eager", **options: Any) -> Any:
        return _compile(model, backend="aot_eager" if backend == "inductor" else backend, **options)

    torch.compile = _compile_without_code

# Tests are small and run side by side: a second thread each would only wait for the first.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="cpu,simt", help="backends of the operator tests: cpu, simt, cuda")


def _backends(config: pytest.Config) -> list[str]:
    return [name for name in config.getoption("--backend").split(",") if name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _backends(metafunc.config), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "cuda" not in _backends(config):
        skip = pytest.mark.skip(reason="index arithmetic past 2^31 needs a GPU: --backend cuda")
        for item in items:
            if "large" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend under test, with its kernels in use. Tensors belong on `device`."""
    name: str = request.param
    if name == "cpu":
        assert "cpu" in _native._kernels, f"backend cpu: {_native._absent['cpu']}"
        yield name
    elif name == "simt":
        with simt_kernels():
            yield name
    elif name == "cuda":
        assert "cuda" in _native._kernels, f"backend cuda: {_native._absent['cuda']}"
        assert not _native._why_not_device(None), f"backend cuda: {_native._why_not_device(None)}"
        yield name
    else:
        raise pytest.UsageError(f"--backend has {name!r}, but expected cpu, simt or cuda")


class simt_kernels:
    """Inside, CPU tensors run the CUDA sources, a fiber per CUDA thread."""

    _kernels = None

    def __enter__(self) -> None:
        self._own = _native._kernels.get("cpu")
        if simt_kernels._kernels is None:
            assert SIMT_LIBRARY.exists(), (
                f"{SIMT_LIBRARY} does not exist: cmake --preset simt && cmake --build --preset simt"
            )
            _native.load(SIMT_LIBRARY, "pygen_simt", "cpu")
            simt_kernels._kernels = _native._kernels["cpu"]
        _native._kernels["cpu"] = simt_kernels._kernels

    def __exit__(self, *_: object) -> None:
        _native._kernels["cpu"] = self._own


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where tensors of the backend under test live."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


@pytest.fixture
def namespace(backend: str) -> str:
    """The namespace of the raw operators of the backend under test, for `torch.library.opcheck`."""
    return "pygen_simt" if backend == "simt" else "pygen"


@pytest.fixture
def four_threads() -> Iterator[None]:
    """PyTorch's thread pool with four threads, for tests of what threads may not change."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

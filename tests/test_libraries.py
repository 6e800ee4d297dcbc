"""The built libraries: their symbols, how they are found, what is said when they are not, and a light import."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pygen.ops
from pygen import _native

FOLDER = Path(_native._runtime.__file__).parent
LIBRARIES = sorted(FOLDER.glob("libpygen_*.so"))


def symbols(path: Path, *options: str) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    command = [nm, "-D", "-C", *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")


def test_what_was_built_is_there():
    built = {"libpygen_cpu.so"} | ({"libpygen_cuda.so"} if _native._runtime.build_facts()["cuda"] else set())
    assert {path.name for path in LIBRARIES} == built


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_only_the_stable_abi_is_used(path):
    undefined = [line for line in symbols(path, "--undefined-only") if "at::" in line or "c10::" in line]
    assert undefined == [], f"{path.name} needs symbols that change with PyTorch's version"
    assert any("aoti_torch" in line for line in symbols(path, "--undefined-only")), "nm shows no stable-ABI symbol"


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_operator_libraries_know_no_python(path):
    assert not [line for line in symbols(path, "--undefined-only") if " Py" in line]


def test_the_runtime_module_knows_no_torch():
    path = Path(_native._runtime.__file__)
    assert not [line for line in symbols(path, "--undefined-only") if "torch" in line]


def test_libraries_carry_no_path_of_the_build():
    checkout = str(Path(__file__).parent.parent)
    for path in LIBRARIES:
        if path.stem == "libpygen_cuda" and " " in checkout:
            continue  # nvcc cannot hand on the option that shortens such a path
        # Not a plain assert of the bytes, which pytest would print.
        found = path.read_bytes().find(f"{checkout}/csrc".encode())
        assert found < 0, f"{path.name} carries the path of the checkout at byte {found}"


def test_every_public_operator_is_native_on_the_cpu():
    report = _native.report()
    assert report["libraries"]["loaded"]
    for name, devices in report["operators"].items():
        assert devices["cpu"]["native"], f"{name}: {devices['cpu']['why']}"


def test_every_schema_belongs_to_a_public_operator():
    defined = {full.partition("::")[2] for full in torch._C._dispatch_get_all_op_names() if full.startswith("pygen::")}
    used = {kernel for kernels in pygen.ops.OPERATORS.values() for kernel in kernels}
    assert defined == used
    for name in pygen.ops.OPERATORS:
        getattr(pygen.ops, name)  # a family's fakes are registered when it loads
    assert used <= set(_native._fakes), "an operator without a fake breaks torch.compile"


def test_where_cuda_is_absent_the_reason_is_said():
    if "cuda" in _native._kernels:
        pytest.skip("this machine has CUDA kernels")
    assert _native._absent["cuda"]
    assert all(not devices["cuda"]["native"] and devices["cuda"]["why"]
               for devices in _native.report()["operators"].values())  # fmt: skip


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("90", (9, 0), True),
        ("80", (8, 6), True),
        ("86", (8, 0), False),
        ("80 90", (10, 0), False),
        ("80 90 100 120+PTX", (12, 1), True),
        ("80+PTX", (12, 0), True),
        ("90+PTX", (8, 0), False),
        ("", (9, 0), False),
    ],
)
def test_architectures_that_serve_a_device(architectures, capability, runs):
    assert _native.serves(architectures, capability) is runs


def test_a_cuda_device_is_asked_for_only_when_a_tensor_is_there(monkeypatch):
    asked = []
    monkeypatch.setattr(_native, "_kernels", {"cuda": "kernels"})
    monkeypatch.setattr(_native, "_served", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, index))
    monkeypatch.setattr(_native._runtime, "build_facts", lambda: {"cuda_architectures": "90"})

    class Somewhere:
        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    assert [_native.kernels_for(Somewhere(0)) for _ in range(3)] == ["kernels"] * 3
    assert asked == [0]
    monkeypatch.setattr(_native._runtime, "build_facts", lambda: {"cuda_architectures": "80"})
    assert _native.kernels_for(Somewhere(1)) is None


def test_thread_control():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _native.set_num_threads(1)
        assert _native.get_num_threads() == 1
        _native.set_num_threads(0)
        assert _native.get_num_threads() == 2
        with pytest.raises(ValueError, match="n is -1"):
            _native.set_num_threads(-1)
    finally:
        _native.set_num_threads(0)
        torch.set_num_threads(threads)


def run(program: str, **environment: str) -> str:
    import os

    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_importing_pygen_loads_nothing_more_than_torch():
    program = """
import sys, torch
before = set(sys.modules)
import pygen
print(sorted(name for name in set(sys.modules) - before if not name.startswith("_") and name != "pygen"))
import pygen.ops
heavy = ("sklearn", "matplotlib", "tyro", "torchmetrics", "scipy", "torch._dynamo", "torch._inductor")
print(sorted(n for n in heavy if n in sys.modules and n not in before))
"""
    assert run(program).split("\n")[:2] == ["[]", "[]"]


def test_without_libraries_the_references_serve(tmp_path):
    program = """
import torch
from pygen import _native, ops
y, ladj = ops.affine(torch.ones(2, 3), torch.zeros(2, 3), None)
assert y.sum() == 6 and ladj.tolist() == [0.0, 0.0]
print(_native.report()["operators"]["affine"]["cpu"]["why"])
"""
    assert "libpygen_cpu.so does not exist" in run(program, PYGEN_LIBRARIES=str(tmp_path))


def test_a_broken_library_is_named(tmp_path):
    (tmp_path / "libpygen_cpu.so").write_bytes(b"not a library")
    program = 'from pygen import _native; print(_native.report()["libraries"]["absent"]["cpu"])'
    assert "libpygen_cpu.so did not load" in run(program, PYGEN_LIBRARIES=str(tmp_path))


def test_the_cuda_library_loads_where_pytorch_has_its_major_version():
    path = FOLDER / "libpygen_cuda.so"
    built = _native._runtime.build_facts()["cuda"].partition(".")[0]
    if not built or (torch.version.cuda or "").partition(".")[0] != built:
        pytest.skip(f"built with CUDA {built or 'absent'}, and this PyTorch has {torch.version.cuda}")
    # In a process of its own: no GPU is needed to resolve the symbols.
    run(f"import torch; from pygen import _native; torch.ops.load_library({str(path)!r})")

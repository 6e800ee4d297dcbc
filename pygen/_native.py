"""Finds and loads the operator libraries; says which kernels a tensor will use, and why not.

Every public function of `pygen.ops` asks `kernels_for(tensor)` for the operators of the tensor's device and runs its
plain-PyTorch reference where the answer is None.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A folder with libpygen_cpu.so to load instead of the installed one, such as that of a sanitizer build.
LIBRARY_FOLDER_VARIABLE = "PYGEN_LIBRARIES"

Fake = Callable[..., Any]


def _import_runtime() -> tuple[Any, str]:
    try:
        from pygen import _runtime
    except ImportError as error:
        return None, f"pygen was not built here ({error})"
    return _runtime, ""


_runtime, _runtime_absent = _import_runtime()
_fakes: dict[str, Fake] = {}
_namespaces: list[str] = []
# Device type -> its operators. What is not here runs on the reference.
_kernels: dict[str, SimpleNamespace] = {}
# Device type -> why it has no kernels.
_absent: dict[str, str] = {}
_loaded: dict[str, str] = {}
# CUDA device -> whether the code that was compiled runs on it.
_served: dict[int | None, bool] = {}


def _folder() -> Path | None:
    named = os.environ.get(LIBRARY_FOLDER_VARIABLE)
    if named:
        return Path(named)
    return Path(_runtime.__file__).parent if _runtime is not None else None


def _operators_of(namespace: str, dispatch_key: str) -> SimpleNamespace:
    """The operators of a namespace that have a kernel under a dispatch key, by name."""
    names = (full.partition("::")[2].partition(".")[0] for full in torch._C._dispatch_get_all_op_names()
             if full.startswith(f"{namespace}::"))  # fmt: skip
    return SimpleNamespace(**{
        name: getattr(getattr(torch.ops, namespace), name).default
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", dispatch_key)
    })  # fmt: skip


def load(path: Path, namespace: str, device_type: str) -> None:
    """Load an operator library and use its operators for tensors of a device type."""
    torch.ops.load_library(str(path))
    _loaded[str(path.name)] = str(path)
    if namespace not in _namespaces:
        _namespaces.append(namespace)
        for name, fake in _fakes.items():
            _register_fake(namespace, name, fake)
    _kernels[device_type] = _operators_of(namespace, "CUDA" if device_type == "cuda" else "CPU")
    _absent.pop(device_type, None)


def _register_fake(namespace: str, name: str, fake: Fake) -> None:
    if hasattr(getattr(torch.ops, namespace), name):
        torch.library.register_fake(f"{namespace}::{name}", fake)


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """Decorator: the function gives the shapes and dtypes of an operator, in every namespace that defines it."""

    def register(fake: Fake) -> Fake:
        _fakes[name] = fake
        for namespace in _namespaces:
            _register_fake(namespace, name, fake)
        return fake

    return register


def _load_cpu() -> None:
    folder = _folder()
    if folder is None:
        _absent["cpu"] = _runtime_absent
        return
    path = folder / "libpygen_cpu.so"
    if not path.exists():
        _absent["cpu"] = f"{path} does not exist"
        return
    try:
        load(path, "pygen", "cpu")
    except OSError as error:
        _absent["cpu"] = f"{path.name} did not load: {error}"
        return
    if _runtime is not None:
        _runtime.attach(str(path))


def _load_cuda() -> None:
    reason = _why_no_cuda()
    if reason:
        _absent["cuda"] = reason
        return
    path = Path(_runtime.__file__).parent / "libpygen_cuda.so"
    try:
        load(path, "pygen", "cuda")
    except OSError as error:
        _absent["cuda"] = f"{path.name} did not load: {error}"


def _why_no_cuda() -> str:
    if _runtime is None:
        return _runtime_absent
    facts = _runtime.build_facts()
    if not facts["cuda"]:
        return str(facts["cuda_absent"])
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is a build without CUDA"
    built, running = facts["cuda"].partition(".")[0], torch.version.cuda.partition(".")[0]
    if built != running:
        return f"pygen was built with CUDA {facts['cuda']}, but this PyTorch has CUDA {torch.version.cuda}"
    if "cpu" not in _kernels:
        return f"the CPU library, which defines the operators, is not loaded: {_absent['cpu']}"
    return ""


def _why_not_device(index: int | None) -> str:
    """Why the loaded CUDA library does not serve a device; empty where it does. Asking initialises CUDA, so this waits
    for the first tensor there: a process that only imports pygen can still fork, or choose its device."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device that its driver can serve"
    capability = torch.cuda.get_device_capability(index)
    architectures = _runtime.build_facts()["cuda_architectures"]
    if serves(architectures, capability):
        return ""
    return f"pygen was compiled for architectures {architectures}, but the device is sm_{capability[0]}{capability[1]}"


def _serves_device(index: int | None) -> bool:
    if index not in _served:
        # A tracer cannot follow the question; a device that was never used eagerly is taken to be the one built for.
        # (`torch.compiler.assume_constant_result` would say so too, and import the whole tracer with this module.)
        if torch.compiler.is_compiling():
            return True
        _served[index] = not _why_not_device(index)
    return _served[index]


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, such as "80 90 120+PTX", runs on a device of this compute capability.

    Machine code runs on its own major version from its minor version up; PTX on everything from its version up.
    """
    major, minor = capability
    for architecture in architectures.split():
        number, _, ptx = architecture.partition("+")
        code_major, code_minor = divmod(int(number.rstrip("a")), 10)
        if code_major == major and code_minor <= minor:
            return True
        if ptx and (code_major, code_minor) <= (major, minor):
            return True
    return False


def kernels_for(x: Tensor) -> SimpleNamespace | None:
    """The operators for tensors like x, or None where the reference serves: another device, a functorch transform
    (`vmap`, `grad`, `jvp`) or forward-mode differentiation in progress."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    kernels = _kernels.get(x.device.type)
    if kernels is not None and x.device.type == "cuda" and not _serves_device(x.device.index):
        return None
    return kernels


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def set_num_threads(n: int) -> None:
    """Limit pygen's CPU operators to n threads; 0 leaves PyTorch's own limit (`torch.set_num_threads`)."""
    if _runtime is None:
        raise RuntimeError(_runtime_absent)
    _runtime.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads pygen's CPU operators may use."""
    return int(_runtime.get_num_threads()) if _runtime is not None else torch.get_num_threads()


def report() -> dict[str, Any]:
    """Versions, loaded libraries, instruction set, CUDA architectures, and for each operator and device whether it is
    native there, with the reason where it is not."""
    import pygen
    import pygen.ops

    facts = dict(_runtime.build_facts()) if _runtime is not None else {}
    operators: dict[str, dict[str, dict[str, Any]]] = {}
    for name, kernels in sorted(pygen.ops.OPERATORS.items()):
        operators[name] = {}
        for device in ("cpu", "cuda"):
            have = _kernels.get(device)
            missing = [kernel for kernel in kernels if not hasattr(have, kernel)]
            why = _absent.get(device, "") if have is None else ""
            if have is not None and device == "cuda":
                why = _why_not_device(None)
            if have is not None and missing:
                why = f"the library has no {', '.join(missing)}"
            operators[name][device] = {"native": have is not None and not why, "why": why}
    return {
        "versions": {
            "pygen": pygen.__version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "built_with": facts,
        },
        "libraries": {"loaded": dict(_loaded), "absent": dict(_absent)},
        "cpu": {
            "instruction_set": _runtime.instruction_set() if "cpu" in _kernels and _runtime is not None else None,
            "threads": get_num_threads() if "cpu" in _kernels else torch.get_num_threads(),
        },
        "cuda": {
            "architectures": facts.get("cuda_architectures", "").split(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "operators": operators,
    }


_load_cpu()
_load_cuda()

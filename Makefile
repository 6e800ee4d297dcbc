# The two commands a newcomer needs are `make demo` and `make test`; `make` lists them all.

PYTHON ?= python3
PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# The other PyTorch of `make test-torch`.
TORCH ?= 2.11.0
# An index to take PyTorch from, such as PyTorch's own for CPU builds, a fraction of the size; pip's own when empty.
TORCH_INDEX ?=
# One architecture keeps the build quick; `make wheel` compiles them all.
CUDA_ARCHITECTURES ?= 90
# Compilers, and processes of the tests, at a time.
JOBS ?= $(shell nproc)

VENV := .venv
RUN := $(VENV)/bin/python
NATIVE := $(wildcard csrc/* cmake/*) CMakeLists.txt pyproject.toml
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-torch sanitize check bench gpu-check wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/built  ## make .venv, install the pinned versions, build pygen into it

demo: setup  ## train the five families on handwritten digits and write the comparison (under 10 minutes)
	$(RUN) -m pygen compare --data digits --out runs/compare

test: setup  ## run every test, the CUDA kernels on the CPU included
	@test build/simt/build.ninja -nt $(VENV)/installed || \
	  PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/cmake --preset simt --fresh >/dev/null
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/cmake --build --preset simt --target pygen_simt
	$(RUN) -m pytest -n $(JOBS) --dist worksteal $(TESTS)

test-torch: wheel  ## the operator tests on another PyTorch, with the wheel as built: make test-torch TORCH=2.11.0
	test -x .venv-torch-$(TORCH)/bin/python || $(PYTHON) -m venv .venv-torch-$(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pip install -q numpy pytest pytest-xdist hypothesis mpmath scipy
	.venv-torch-$(TORCH)/bin/python -m pip install -q --force-reinstall --no-deps dist/pygen_torch-*.whl
	# Safe path: the checkout's own pygen/ must not stand before the wheel's.
	PYTHONSAFEPATH=1 .venv-torch-$(TORCH)/bin/pytest -p no:cacheprovider -n $(JOBS) --backend cpu \
	  tests/ops tests/test_libraries.py

sanitize: setup  ## the operator tests under AddressSanitizer and ThreadSanitizer
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tests/sanitize asan
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tests/sanitize tsan

check: setup  ## formatting, lint and types: what pre-commit runs
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.cu tests/*.cpp tests/simt/*.h tests/simt/*.cu
	$(RUN) -m mypy

bench: setup  ## time the operators against eager, torch.compile and the peers
	$(RUN) -m pip install -q -r benchmarks/peers.txt
	$(RUN) benchmarks/run.py --out benchmarks/results

gpu-check:  ## on a machine with a GPU: build for it without network, test backend cuda, run the benchmarks
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . \
	  -C cmake.define.PYGEN_CUDA=on -C cmake.define.PYGEN_CUDA_ARCHITECTURES="$$($(PYTHON) -c \
	  'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
	$(PYTHON) -m pytest --backend cuda tests
	$(PYTHON) benchmarks/run.py --device cuda --out benchmarks/results

wheel: setup  ## dist/*.whl with the CPU and CUDA libraries, four architectures and PTX
	rm -rf dist
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip wheel -q --no-build-isolation --no-deps -w dist . -C build-dir=build/wheel

clean:  ## remove everything that was built
	rm -rf build dist $(VENV) .venv-torch-*

# PyTorch and everything pinned. A venv that broke half-way is made anew.
$(VENV)/installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "pygen needs Python >= 3.10, but $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv is missing: apt-get install python3-venv (Debian, Ubuntu)"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "Python.h is missing: apt-get install python3-dev (Debian, Ubuntu) or dnf install python3-devel (Fedora)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "a C++20 compiler is missing: apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "Installing PyTorch $(PINNED_TORCH) (this downloads it the first time)"
	$(RUN) -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(PINNED_TORCH)
	@echo "Installing the pinned tools"
	$(RUN) -m pip install -q -r constraints.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(NATIVE)
	@echo "Building pygen"
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install -q --no-build-isolation --no-deps -e . \
	  -C cmake.define.PYGEN_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)"
	@touch $@

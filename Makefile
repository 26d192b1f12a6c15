# make demo, make test: from a fresh clone, with Python >= 3.10; each makes .venv first and installs everything there.
# make test-gpu PYTHON=python3: with an interpreter that has torch and triton already; installs nothing, needs a GPU.

PYTHON ?= python3
# Any torch that pyproject.toml allows, for example TORCH='torch==2.11.0'. A build for CUDA pins its triton exactly, and one for
# the CPU names none, so triton is a range that holds the pins.
TORCH ?= torch==2.13.0
TRITON ?= triton>=3.6,<3.8
EXTRAS ?= cli,dev,examples,jax

# Compiling takes most of the GPU tests' time: with pytest-xdist they share the machine's processors.
WORKERS = $(shell $(PYTHON) -c 'import os, xdist; print("-n", min(24, os.cpu_count() or 1), "--maxschedchunk 1")' 2>/dev/null)

VENV := .venv
BIN := $(VENV)/bin
# Named after what was asked for: another TORCH, TRITON or EXTRAS installs anew.
STAMP := $(VENV)/installed-$(firstword $(shell printf '%s' '$(TORCH) $(TRITON) $(EXTRAS)' | cksum))

.DEFAULT_GOAL := help
.PHONY: help demo test test-compiled test-tpu test-faults test-mutants test-gpu test-gpu-2 sanitize lint format clean

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

demo: $(STAMP) ## Run the demo: no GPU needed
	$(BIN)/python examples/demo.py

# On matrices this small a second thread of torch's costs more than it saves, and two processes share two processors already.
test: export OMP_NUM_THREADS = 1
test: lint ## Lint, types, and every test that needs no GPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/interpreted
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/pallas
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/faults tests/compiled

test-compiled: $(STAMP) ## Every kernel of 24 specs for six architectures, compiled only
	$(BIN)/python -m tests.compiled.matrix

test-tpu: $(STAMP) ## Every spec compiled for four TPUs, without one: libtpu is a download of 130 MB
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(VENV)/libtpu --no-deps libtpu
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/libtpu $(BIN)/python -m tests.pallas.tpu

test-faults: $(STAMP) ## All that can happen to the caches, in full: 15 minutes; as root it mounts a small file system
	MLPDSL_TEST_FAULTS=full $(BIN)/python -m pytest -q tests/faults

test-mutants: $(STAMP) ## The mutation gate in full: which test kills which wrong kernel
	$(BIN)/python -m tests.mutation

test-gpu: ## The tests that need a GPU, with PYTHON as it is
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest tests/gpu -q $(WORKERS)

test-gpu-2: ## The tests that need two GPUs
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest tests/gpu/test_two_gpus.py -q

sanitize: ## Twenty specs under compute-sanitizer (CUDA toolkit), on a GPU
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m tests.sanitizer --out benchmarks/results/sanitizer.json

lint: $(STAMP) ## Ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and what tools leave behind
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"mlpdsl needs Python 3.10 or later; {sys.executable} is {sys.version.split()[0]}. Name another: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check '$(TORCH)' '$(TRITON)' -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/installed-*
	@touch $@

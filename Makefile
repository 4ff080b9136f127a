# Every target prepares its own environment; Python 3.12 and make are all it needs.
#   make test                       newest JAX in .venv
#   make test JAX_VERSION=0.11.2    the same tests on that JAX in .venv-0.11.2

PYTHON ?= python3.12
JAX_VERSION ?=
OLDEST_JAX := 0.11.2
WORKERS ?= 2
TESTS ?= tests
# What the oldest JAX has to pass in CI: all that meets JAX, but for the planner, the command, files of models, the host
# side of serving, and the project itself. `make test-full` runs all of it.
OTHERS := benchmarks cli docs examples imports memory structure checkpoints convert multihost pretrained \
	serving_hosts serving_radix serving_tiers sharding_experiments smaller_caches
CORE := $(filter-out $(patsubst %,tests/test_%.py,$(OTHERS)),$(shell grep -l "import jax" tests/test_*.py))

VENV := .venv$(if $(JAX_VERSION),-$(JAX_VERSION))
JAX_PIN := $(if $(JAX_VERSION),"jax==$(JAX_VERSION)" "jaxlib==$(JAX_VERSION)")
GROUP := $(if $(JAX_VERSION),test,dev)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

export PIP_PROGRESS_BAR ?= off
export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.PHONY: help demo test test-full mutants kernels-aot test-oldest lint format docs docs-test bench bench-peers clean

help:
	@echo "make demo | test | test-full | mutants | kernels-aot | test-oldest | lint | format | docs | docs-test | bench | bench-peers | clean"

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 12), "kvattn needs Python 3.12, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(PIP) install --quiet --editable . --group demo $(JAX_PIN)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(PIP) install --quiet --editable . --group $(GROUP) $(JAX_PIN)
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(TESTS)

# All of it, compiled as users' programs are.
test-full: $(VENV)/.dev kernels-aot
	KVATTN_TEST_OPTIMIZE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" --shapes=1 $(TESTS)
	$(MAKE) test JAX_VERSION=$(OLDEST_JAX)
	$(MAKE) mutants MUTANTS="--sample 30"

# Planted faults: each must fail a test. MUTANTS="--sample 30" plants 30 of them, others every day; MUTANTS="kivi
# pallas/" those with one of these words. What is known already is not run again.
MUTANTS ?=
mutants: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m mutants --workers $(WORKERS) $(MUTANTS)

# The CUDA plugin and NVIDIA's assembler without the libraries that programs need when they run.
$(VENV)/.aot: pyproject.toml $(VENV)/.demo
	$(PIP) install --quiet --group aot
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(PIP) install --quiet --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm
	@touch $@

kernels-aot: $(VENV)/.aot
	$(BIN)/python benchmarks/kernels_aot.py

# Annotations of shapes are checked in one test of sixteen, which makes these twice as slow; test-full checks all.
test-oldest:
	$(MAKE) test JAX_VERSION=$(OLDEST_JAX) TESTS="--shapes=16 $(CORE)"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pictures are drawn by running the library. In CI those that are committed must be the ones it draws.
docs: $(VENV)/.dev
	$(BIN)/python docs/drawings $(if $(CI),--check)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env -q -b html docs site
	@echo "docs: site/index.html"

# Every code block of the pages and notebooks, executed: five minutes of one core, and so not a part of `make test`.
docs-test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -k test_page tests/test_docs.py

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/decode_cpu.py

# PyTorch beside it, in an environment of its own. Where only another Python has it: make bench-peers PEERS_PYTHON=...
PEERS_PYTHON ?= $(PYTHON)
.venv-peers/.done:
	$(PEERS_PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 numpy
	@touch $@

bench-peers: $(VENV)/.demo .venv-peers/.done
	$(BIN)/python benchmarks/decode_peers.py --python .venv-peers/bin/python

clean:
	rm -rf .venv .venv-* site jupyter_execute build dist .cache .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything sets itself up: Python >= 3.11 and make are enough.
#   make quickstart   train an SE-ResNet on handwritten digits (under 3 minutes on 2 cores)
#   make test         all tests, for the interpreter at hand
#   make help         the rest

PYTHON ?= $(shell sh tools/find_python.sh 11)
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits
# Compiling is single-threaded for the most part: one test process per core.
TEST_PROCESSES ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)

.PHONY: help quickstart trained test test-fast test-oldest test-newest parity stress fuzz lint types check docs package clean

help:
	@echo "make quickstart    train on digits into $(WORKDIR)"
	@echo "make trained       train CIFAR-10 to the end with and without SE, and write docs/trained.md"
	@echo "make test          run the tests (.venv, pinned by constraints.txt); ORDER=1 shuffles them"
	@echo "make test-fast     the tests without the slow ones (under 2 minutes on 2 cores)"
	@echo "make test-oldest   the same with the oldest releases that pyproject.toml allows (.venv-oldest)"
	@echo "make test-newest   the same on Python >= 3.12 with the newest releases (.venv-newest)"
	@echo "make parity        compare every network with timm's numbers, and write docs/parity.md (an hour or more)"
	@echo "make lint types    ruff; mypy"
	@echo "make stress        kill trainings 200 times, compare what they leave, and write docs/reliability.md"
	@echo "make fuzz          give every reader of foreign files 10,000 mutated inputs, and write docs/reliability.md"
	@echo "make check         lint, types, test"
	@echo "make docs          build the documentation into site/, strictly (open site/index.html)"
	@echo "make package       build wheel and source distribution into dist/, install the wheel afresh and run it"
	@echo "make clean         remove environments, caches and builds"

$(VENV)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; install it, or run make PYTHON=/path/to/python3"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: $(VENV)/ready
	$(BIN)/python -m train --config=configs/digits.py --workdir=$(WORKDIR)

# CIFAR-10 is tfds:cifar10, prepared once (docs/data.md), or SOURCE=folder:<path>.
SOURCE ?= tfds:cifar10
SEEDS ?= 1
trained: $(VENV)/ready
	$(BIN)/python -m train.ablation --config=configs/ablation.py:all@cifar10:small --cells=none,se --seeds=$(SEEDS) \
	  --config.data.place=device --workdir=runs/trained --results=benchmarks/results/trained.jsonl --config.data.source=$(SOURCE)
	$(BIN)/python -m benchmarks.trained

# The inner loop: what takes under 0.5 s, see tools/slow_tests.py.
test-fast: $(VENV)/ready
	$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) -m "not slow"

# ORDER=<number> shuffles the tests.
ORDER ?=
test: $(VENV)/ready
	SE_FLAX_ORDER=$(ORDER) $(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES)

# `make test` compares one network of each kind. Reference numbers are in tests/parity; timm is not needed.
parity: $(VENV)/ready
	SE_FLAX_ALL=1 $(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) tests/test_parity.py
	$(BIN)/python -m benchmarks.parity --all

# Takes hours on two cores; a failure is repeated by its seed and number, see tests/stress/kills.py.
KILLS ?= 200
SEED ?= 0
stress: $(VENV)/ready
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m tests.stress.kills \
	  --kills=$(KILLS) --seed=$(SEED) --write=docs/reliability.md
	$(BIN)/python -m tests.stress.hosts --write=docs/reliability.md

# Coverage-guided where atheris is installed; inputs and tracebacks of findings are in runs/fuzz.
INPUTS ?= 10000
fuzz: $(VENV)/ready
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.stress.fuzz --inputs=$(INPUTS) --seed=$(SEED) --write=docs/reliability.md

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

check: lint types test

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# In environments of its own: what is published must not depend on what is installed here.
package:
	rm -rf dist .venv-package
	"$(PYTHON)" -m venv .venv-package/build
	.venv-package/build/bin/python -m pip install --quiet "build>=1.3" "twine>=6.1"
	.venv-package/build/bin/python -m build
	.venv-package/build/bin/python -m twine check --strict dist/*
	"$(PYTHON)" -m venv .venv-package/fresh
	.venv-package/fresh/bin/python -m pip install --quiet dist/*.whl
	cd dist && ../.venv-package/fresh/bin/se-flax list '*seresnet50*'
	rm -rf .venv-package

# uv chooses the releases: pip looks for the newest ones that fit together for ten minutes and more.
.venv-newest/ready: pyproject.toml
	rm -rf .venv-newest
	"$$(sh tools/find_python.sh 12)" -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet uv
	.venv-newest/bin/uv pip install --quiet --python .venv-newest/bin/python --upgrade --editable ".[dev]"
	@touch $@

# Packages that ours need, and ours do not name, are the newest ones; pip has no such option.
.venv-oldest/ready: pyproject.toml
	"$(PYTHON)" -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution=lowest-direct --editable ".[dev]"
	@touch $@

test-oldest: .venv-oldest/ready
	SE_FLAX_ORDER=$(ORDER) .venv-oldest/bin/python -m pytest --numprocesses=$(TEST_PROCESSES)

test-newest:
	@if [ -z "$$(sh tools/find_python.sh 12)" ]; then \
	  echo "no Python 3.12 or newer here; nothing was tested"; \
	else \
	  $(MAKE) --no-print-directory .venv-newest/ready && \
	  .venv-newest/bin/python -m pytest --numprocesses=$(TEST_PROCESSES); \
	fi

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-package build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

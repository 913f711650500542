# Every target does all of its own set-up: only Python >= 3.10 and make are needed.
#   make test PYTHON=python3.12        another interpreter

PYTHON ?= python3
BIN := .venv/bin
RUNS := .venv/.runs
READY := .venv/.ready

# Compiled files are kept even where the environment says not to: without them every start of clipkit takes 7 s longer.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help test test-cluster lint format demo setup clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

test: lint  ## formatting, lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile

test-cluster: $(READY)  ## two hosts and a SLURM cluster on this machine; skips without root, iproute2 or SLURM
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow -rs --durations=8 --numprocesses 2 --dist loadfile tests/launch

lint: $(READY)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(RUNS)  ## the whole chain on a generated world: data, negatives, two trainings, report
	$(BIN)/clipkit demo

setup: $(READY)  ## only the virtual environment (.venv)

clean:  ## remove the virtual environment and caches
	rm -rf .venv .pytest_cache .ruff_cache build dist

# Made anew whenever pyproject.toml changes, so that what runs is what is declared. Bytecode is made on first use: half a
# minute less.
$(RUNS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "clipkit needs Python >= 3.10; name one with: make PYTHON=python3.12" >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable .
	touch $@

# What tests and checks need beside it.
$(READY): $(RUNS)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

# Every target installs by constraints.txt into .venv; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= synthetic
ARGS ?=
# Where `make demo` and `make serve` write; `make clean` removes it.
export NEXTITEM_HOME ?= $(CURDIR)/runs
# A private Ray on the loopback needs no token.
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
# The address of PyTorch's CPU wheels, for a machine without a GPU whose own index brings CUDA.
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-slow test-long test-gpu lint format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

setup: $(VENV)/.installed  ## a virtual environment with the pinned dependencies

$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "Python 3.11 or 3.12 is needed, and $(PYTHON) is not; run: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),-i "$(TORCH_INDEX)") torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,feast]'
	@touch $@

demo: setup  ## the whole road; DATA=synthetic|ml-1m|retailrocket|globo, ARGS=--exit
	$(BIN)/python -m ray_jobs.demo --data $(DATA) $(ARGS)

serve: setup  ## the endpoint for the version that an earlier demo published; DATA as above
	$(BIN)/python -m ray_jobs.demo --data $(DATA) --serve-only $(ARGS)

test: setup  ## unit tests, then Ray, Serve and end-to-end tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'not ray and not slow and not long and not gpu'
	$(BIN)/python -m pytest -q -m 'ray and not slow and not long and not gpu'

test-slow: setup  ## faults and long end-to-end runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'slow and not ray and not gpu'
	$(BIN)/python -m pytest -q -m 'slow and ray and not long and not gpu'

test-long: setup  ## the benchmarks, made small, and what CI has no time for
	$(BIN)/python -m pytest -q -m 'long and not gpu'

test-gpu: setup  ## what needs a CUDA device
	$(BIN)/python -m pytest -q -m gpu

lint: setup  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## the benchmarks behind the README's figures
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	$(BIN)/python -m benchmarks.road
	$(BIN)/python -m benchmarks.sequences
	$(BIN)/python -m benchmarks.lake
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.metrics_check
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.memory_plan
	$(BIN)/python -m benchmarks.large_catalogues

clean:  ## remove the environment and everything that demos wrote
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# From a fresh clone: `make demo` or `make test`. Needs Python 3.11 or newer, make and a compiler.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
DATA ?= ../shared/data/codec16k

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench-codec clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 found; install one or say make PYTHON=/path/to/it"; exit 2; }
	@echo "installing into $(VENV), which downloads PyTorch: a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## make .venv and install everything into it

demo: $(STAMP)  ## cut, fine-tune, calibrate and judge the pretrained codec (about a minute)
	$(BIN)/dslify demo

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, then the test suite on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench-codec: $(STAMP)  ## the codec on a folder of real sound: make bench-codec DATA=folder
	$(BIN)/python benchmarks/codec.py --data $(DATA)

clean:  ## remove what builds, tests and the demo left behind (not .venv)
	rm -rf build dist demo-out runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# From a fresh clone: `make demo` or `make test`. Needs Python 3.11 or newer, make and a compiler.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
DATA ?= ../shared/data/codec16k
KEYWORDS ?= ../shared/data/kws16k
ZOO ?=
SURGERY ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint zoo evaluate evaluate-keywords bench-codec bench-inherit bench-surgery bench-memory bench-train bench-latency bench-routing clean

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

evaluate: $(STAMP)  ## retrofit the codec and judge it, up to an hour: make evaluate DATA=folder KEYWORDS=folder
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.soundstream.evaluate --data $(DATA) --keywords $(KEYWORDS)

evaluate-keywords: $(STAMP)  ## gates in the keyword network, beside their rivals (about half an hour): make evaluate-keywords DATA=folder
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.keyword_spotting.evaluate --data $(if $(filter command line,$(origin DATA)),$(DATA),$(KEYWORDS))

bench-codec: $(STAMP)  ## the codec on a folder of real sound: make bench-codec DATA=folder
	$(BIN)/python benchmarks/codec.py --data $(DATA)

bench-inherit: $(STAMP)  ## inherited weights against random ones: make bench-inherit DATA=folder
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.inherit --data $(DATA)

bench-surgery: $(STAMP)  ## side by side with the public pruner (pip install torch-pruning first)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.surgery $(SURGERY)

bench-memory: $(STAMP)  ## peak memory of insert on a network of 304 M parameters
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory

bench-train: $(STAMP)  ## time of a training step against its parts measured alone
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.train

bench-latency: $(STAMP)  ## light, full and a mixed stream in ONNX Runtime, one thread (about 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.latency

bench-routing: $(STAMP)  ## what routing costs in eager PyTorch
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.routing

zoo: $(STAMP)  ## the surgery on 228 networks at three cuts each (about 45 minutes; ZOO="--times --jobs 1" for seconds alone)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --jobs 2 --json runs/zoo/zoo.json $(ZOO)

clean:  ## remove what builds, tests and the demo left behind (not .venv)
	rm -rf build dist demo-out runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

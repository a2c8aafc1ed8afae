# Every target makes its own environment in .venv; nothing else has to be installed but Python 3.10+ with venv.
# TORCH=2.15.0 makes one with that version in .venv-2.15.0; PYTHON=python3.13 makes it of that interpreter.
PYTHON ?= python3
DEFAULT_TORCH := 2.13.0
TORCH ?= $(DEFAULT_TORCH)
VENV := .venv$(addprefix -,$(filter-out $(DEFAULT_TORCH),$(TORCH)))
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-zoo bench gpu-report gpu lint format clean

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/initperf ticket --data digits --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# torchvision and timm need CUDA's torch, gigabytes: a second environment, never part of the others
.venv-zoo/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.14.1 torchvision==0.29.1 "timm==1.0.*" numba safetensors matplotlib rich typer scipy pytest
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

test-zoo: .venv-zoo/.installed
	.venv-zoo/bin/python -m pytest -m zoo tests/test_zoo.py

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu-report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_static --write

gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_run

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

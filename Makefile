# Every target makes its own environment in .venv; nothing else has to be installed but Python 3.10+ with venv.
# TORCH=2.15.0 makes one with that version in .venv-2.15.0; PYTHON=python3.13 makes it of that interpreter.
PYTHON ?= python3
DEFAULT_TORCH := 2.13.0
TORCH ?= $(DEFAULT_TORCH)
VENV := .venv$(addprefix -,$(filter-out $(DEFAULT_TORCH),$(TORCH)))
BIN := $(VENV)/bin

# What torch 2.11 to 2.15 bring (benchmarks/triton_versions.py); 3.9 needs Python 3.11
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
TRITON ?= $(firstword $(TRITONS))

.PHONY: demo test test-slow test-zoo test-avx2 test-triton bench gpu-report gpu lint format clean

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

# The kernels of each kind as a processor with AVX2 alone gets them; their results on this one
test-avx2: $(VENV)/.installed
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= $(BIN)/python -m pytest -n 2 \
		tests/kernels/test_masked_matmul.py tests/kernels/test_sparse_products.py tests/kernels/test_moments.py \
		tests/kernels/test_sample_many.py tests/layers/test_sequential.py tests/tickets/test_prune.py

# torchvision and timm need CUDA's torch, gigabytes: a second environment, never part of the others
.venv-zoo/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.14.1 torchvision==0.29.1 "timm==1.0.*" numba safetensors matplotlib rich typer scipy pytest
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

test-zoo: .venv-zoo/.installed
	.venv-zoo/bin/python -m pytest -m zoo tests/project/test_zoo.py

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

# A Triton alone, in a folder that goes first on Python's path
.PRECIOUS: $(VENV)/triton-%/.installed
$(VENV)/triton-%/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$*
	touch $@

# All GPU kernels compiled, not run, with another Triton than the installed one: make test-triton TRITON=3.8.0
test-triton: $(VENV)/triton-$(TRITON)/.installed
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -m pytest -n 2 \
		tests/kernels/test_gpu_static.py tests/kernels/test_sample_gpu_code.py tests/kernels/test_moments_gpu_code.py

$(VENV)/triton-%/rows.json: $(VENV)/triton-%/.installed FORCE
	-PYTHONPATH=$(CURDIR)/$(@D) $(BIN)/python -m tools.gpu_report.report --json $@

FORCE:

gpu-report: $(TRITONS:%=$(VENV)/triton-%/rows.json)
	$(BIN)/python -m tools.gpu_report.report --write $^

gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu.run

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

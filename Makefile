PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# With no torch installed, `pip install torch==2.13.0` finds the CPU build. On a GPU machine, install the torch
# that fits it into $(VENV) first, or set TORCH to its requirement.
TORCH ?= $(shell grep '^torch==' constraints.txt)
CODE := cvx_core cvx_io cvx_parallel cvx_plugins tests benchmarks examples recipes

.PHONY: install demo test matrix test-all check lint bench clean

install: $(VENV)/installed

# Python compiles what it imports; compiling all of torch beforehand takes longer than the rest of the installation.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	touch $@

# One thread: a model this small spends more time handing work over than it saves.
demo: export OMP_NUM_THREADS ?= 1
demo: install
	$(BIN)/python recipes/demo/make_clips.py runs/demo/clips
	$(BIN)/python -m cvx_core.run recipes/demo/train.yaml
	$(BIN)/python -m cvx_core.run recipes/demo/sample.yaml
	$(BIN)/python recipes/demo/score.py runs/demo
	$(BIN)/python recipes/demo/make_clips.py runs/demo/lora-clips --new --each 3
	$(BIN)/python -m cvx_core.run recipes/demo/lora.yaml
	$(BIN)/python -m cvx_core.run recipes/demo/lora-sample.yaml
	$(BIN)/python recipes/demo/score.py runs/demo/lora-sample --need 17
	$(BIN)/python -m cvx_core.run recipes/demo/lora-sample.yaml --set output=runs/demo/lora-off --set adapters[0].scale=0
	$(BIN)/python recipes/demo/score.py runs/demo/lora-off --most 8

test: lint
	$(BIN)/python -m pytest -m "not matrix"

matrix: install
	$(BIN)/python -m pytest -m matrix

test-all: test matrix

check: lint
	$(BIN)/python -m pytest -m "not slow and not matrix"

lint: install
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs build *.egg-info

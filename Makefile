# Every target builds what it needs from nothing: a virtual environment, torch, the package with the right extra.
PYTHON ?= python3
VENV ?= .venv
# Processes of the quick and of the slow test suite; 0 runs tests in one process.
WORKERS ?= 2
SLOW_WORKERS ?= 2

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed-demo ## Install the package and train a first adapter
	$(BIN)/lightning-peft fit --config configs/quickstart.yaml

# One thread per process: small models gain nothing from more, and processes do not fight for cores.
test: $(VENV)/.installed-test ## Run the quick tests, then the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(SLOW_WORKERS) -m slow || test $$? -eq 5  # 5: no test is marked slow

lint: $(VENV)/.installed-dev ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Rewrite files to the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove caches and build products
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch comes first and alone: a later requirement on it then keeps the build that is installed.
$(VENV)/.installed-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

# Editable for every extra, so that whichever target ran last, the environment runs this checkout.
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml constraints.txt
	$(INSTALL) --editable '.[$*]'
	@touch $@

# Every target builds what it needs from nothing: a virtual environment, torch, the package with the right extra.
PYTHON ?= python3
VENV ?= .venv
# Processes of the quick and of the slow test suite; 0 runs tests in one process.
WORKERS ?= 2
SLOW_WORKERS ?= 2
# Where `evidence` finds the data sets and the small decoder.
DATA ?= ../shared/data
MODELS ?= ../shared/models

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where nothing is kept, each worker and each process that a test starts compiles all files anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test test-all test-newest test-oldest test-wheel lint docs evidence format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Threads that wait do not spin: where other programs keep the cores busy, the run would take several times as long.
quickstart: $(VENV)/.installed-demo ## Install the package and train a first adapter
	OMP_WAIT_POLICY=passive $(BIN)/lightning-peft fit --config configs/quickstart.yaml

# One thread per process: small models gain nothing from more, and processes do not fight for cores.
test: $(VENV)/.installed-test ## Run the quick tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

test-all: test ## Run the quick tests, then the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(SLOW_WORKERS) --dist worksteal -m slow

# Of torch, the pinned build: newer ones may be no CPU builds. All else is asked for anew each time.
test-newest: ## Run the quick tests on the newest release of everything but torch
	$(PYTHON) -m venv $(VENV)-newest
	grep '^torch==' constraints.txt > $(VENV)-newest/torch.txt
	$(VENV)-newest/bin/python -m pip install --constraint $(VENV)-newest/torch.txt torch
	$(VENV)-newest/bin/python -m pip install --constraint $(VENV)-newest/torch.txt \
		--upgrade --upgrade-strategy eager --editable '.[test]'
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/pytest -n $(WORKERS)

# What old releases call has since been deprecated by others, which is no matter of this package.
test-oldest: ## Run the quick tests on the lowest versions that pyproject.toml names
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python .ci/lowest.py > $(VENV)-oldest/lowest.txt
	$(VENV)-oldest/bin/python -m pip install --constraint $(VENV)-oldest/lowest.txt torch
	$(VENV)-oldest/bin/python -m pip install --constraint $(VENV)-oldest/lowest.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/pytest -n $(WORKERS) -W ignore::DeprecationWarning -W ignore::FutureWarning

# `build` makes the wheel from the source distribution, so that both are tested. The quick start runs on the wheel alone.
test-wheel: ## Build the distributions, test the wheel without extras, then the quick start with it
	rm -rf dist build/quickstart
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --constraint constraints.txt build torch
	$(VENV)-wheel/bin/python -m build --outdir dist
	$(VENV)-wheel/bin/python -m pip install --constraint constraints.txt dist/*.whl
	$(VENV)-wheel/bin/python .ci/check_wheel.py
	$(VENV)-wheel/bin/python -m pip install --constraint constraints.txt "$$(echo dist/*.whl)[demo]"
	mkdir -p build/quickstart && cp -r configs examples build/quickstart
	cd build/quickstart && $(abspath $(VENV))-wheel/bin/lightning-peft fit --config configs/quickstart.yaml

# Goes on where it was stopped; takes some hours from nothing.
evidence: $(VENV)/.installed-test ## Run every method on real sets, over seeds, and write tables and charts
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py --data $(DATA) --models $(MODELS)
	$(BIN)/python benchmarks/evidence_chart.py
	$(BIN)/python docs/write_results.py

lint: $(VENV)/.installed-dev ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Rewrite files to the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Without a network: the theme brings all it needs, and links to other hosts are not followed.
docs: $(VENV)/.installed-docs ## Build the site of the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove caches and build products
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path './$(VENV)*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch comes first and alone: a later requirement on it then keeps the build that is installed.
$(VENV)/.installed-torch: constraints.txt
	@echo "Installing torch into $(VENV), some 200 MB ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch
	@touch $@

# Editable for every extra, so that whichever target ran last, the environment runs this checkout.
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml constraints.txt
	@echo "Installing lightning_peft[$*] and what it needs into $(VENV) ..."
	@$(INSTALL) --editable '.[$*]'
	@touch $@

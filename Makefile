# Argus: everything a developer runs. Each target sets up what it needs.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help setup serve picture grid test slow-test cluster-test faults lint bench docs screenshots wheel compat clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (downloads PyTorch and diffusers) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt torch
	@$(PIP) --no-deps -r constraints.txt
	@$(PIP) --no-deps --editable .
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib src || true  # on every core; some templates are no Python
	@touch $@

setup: $(READY) ## a virtual environment in .venv with everything in it

serve: $(READY) ## the server, on port 8000 (make serve FLAGS="--port 9000")
	@echo "Starting the server, about 20 seconds ..."
	@$(BIN)/argus serve $(FLAGS)

picture: $(READY) ## a first picture, in argus.png
	@$(BIN)/argus generate "a red house in the snow" --output argus.png

grid: $(READY) ## the README's pictures by the shipped weights: docs/grid.png, docs/strip.png
	@$(BIN)/python -m argus.families.pictogram.grid docs/grid.png
	@$(BIN)/python -m argus.families.pictogram.strip docs/strip.png

test: $(READY) ## the tests that CI runs (about 10 minutes on two cores)
	@echo "Testing ..."
	@$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

slow-test: $(READY) ## the tests of half a minute each
	@echo "Testing whole servers and trainings ..."
	@$(BIN)/pytest -m slow

faults: $(READY) ## minutes of load on a real server while its workers fail (FAULT_MINUTES=5)
	@echo "Failing workers under load ..."
	@$(BIN)/pytest tests/faults -m soak -s

cluster-test: $(READY) ## the tests of several nodes and servers (Ray, PostgreSQL, S3; minutes)
	@echo "Testing nodes and servers ..."
	@$(BIN)/pytest -m cluster

lint: $(READY) ## ruff and mypy
	@echo "Checking style and types ..."
	@$(BIN)/ruff check src tests benchmarks docs
	@$(BIN)/ruff format --check src tests benchmarks docs
	@$(BIN)/mypy

bench: $(READY) ## every benchmark of benchmarks/ (many minutes)
	@echo "Painting prompts at many step counts and skips ..."
	@$(BIN)/python benchmarks/pilot.py --json
	@echo "Filling caches of up to a million prompts ..."
	@$(BIN)/python benchmarks/cache.py
	@echo "Asking a server for whole and resumed pictures ..."
	@$(BIN)/python benchmarks/api.py
	@echo "Planning, routing, forecasting and simulating ..."
	@for one in planner router forecast feedback simulator drift; do $(BIN)/python benchmarks/$$one.py; done
	@for one in parts events scale; do $(BIN)/python benchmarks/evaluation.py $$one; done

docs: $(READY) ## the documentation as a site, in site/
	@echo "Building the documentation ..."
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

screenshots: $(READY) ## docs/screenshots: the page with a picture and in a burst (needs Chromium)
	@echo "Photographing the page ..."
	@$(BIN)/python docs/tools/screenshots.py docs/screenshots

wheel: $(READY) ## dist/*.whl, with the bundled model's weights
	@echo "Building the wheel ..."
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

compat: $(READY) ## other people's clients against a server (docs/compatibility.md)
	@echo "Setting up $(VENV)-compat (downloads the clients) ..."
	@$(PYTHON) -m venv $(VENV)-compat
	@$(VENV)-compat/bin/pip install --quiet --disable-pip-version-check openai 'litellm[proxy]' \
		langchain-community haystack-ai httpx pillow
	@ARGUS=$(abspath $(BIN)/argus) $(VENV)-compat/bin/python benchmarks/compat.py

clean: ## remove the virtual environment and caches
	@echo "Removing $(VENV) and caches ..."
	@rm -rf $(VENV) $(VENV)-compat .pytest_cache .mypy_cache .ruff_cache .hypothesis dist site
	@find src tests -name __pycache__ -prune -exec rm -rf {} +

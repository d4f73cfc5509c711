# The targets that the README and CI use. Everything happens inside .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
SOURCES := $(shell find core evals exporter prune quantize runtime -name '*.py')
PACKAGES := core evals exporter prune quantize runtime reference benchmarks tests
WORKERS ?= 2
WEB := tests/exporter/web/node_modules

.PHONY: help run test lint types unit format reference reference-second results results-pruning benchmarks clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

run: $(VENV)/.run  ## install, run the main job on the embedded reference pair
	$(BIN)/holdfast run reference/recipe.yaml --out bundles/reference --overwrite

test: lint types unit  ## install what the tests need, run all checks

lint: $(VENV)/.dev  ## ruff, formatting, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.dev  ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy reference
	$(BIN)/mypy benchmarks

unit: $(VENV)/.dev $(WEB)  ## pytest, on two processes (WORKERS=n for more)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

format: $(VENV)/.dev  ## rewrite the sources as ruff formats them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: $(VENV)/.dev  ## train the reference pair again (about an hour on 2 cores)
	$(BIN)/python -m reference.train all --data-dir $(DATA) --out reference

reference-second: $(VENV)/.dev  ## train the second pair again (about an hour on 2 shared cores)
	$(BIN)/python -m reference.train all --pair second --data-dir $(DATA) --out reference/second \
	  --work build/reference-second

results: $(VENV)/.dev  ## measure the part of docs/results.md on quantization again
	$(BIN)/python -m reference.results --data-dir $(DATA) --work build/results --out docs/results.md

results-pruning: $(VENV)/.dev  ## measure the part of docs/results.md on pruning again (idle machine)
	$(BIN)/python -m reference.pruning --data-dir $(DATA) --work build/pruning --out docs/results.md

benchmarks: $(VENV)/.dev  ## measure the tables of docs/benchmarks.md again (idle machine, 24 GB of memory)
	$(BIN)/python -m benchmarks --work build/benchmarks --out docs/benchmarks.md

prune-memory: $(VENV)/.dev  ## measure docs/pruning-memory.md again (10 GB of memory, a few hours)
	$(BIN)/python -m benchmarks.prune_memory --work build/prune-memory --out docs/pruning-memory.md

clean:  ## remove what the other targets made
	rm -rf $(VENV) build bundles .mypy_cache .ruff_cache .pytest_cache *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# onnxruntime-web, for the tests that run bundles under Node; without npm they are skipped and say so.
$(WEB): tests/exporter/web/package-lock.json
	@cd $(@D) && npm ci --silent --no-audit --no-fund --fetch-retries=1 --fetch-timeout=30000 \
	  || echo "onnxruntime-web could not be installed with npm: its tests will be skipped"

# The editable install is strict (a tree of links), so a new file needs a new install.
$(VENV)/.run: pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@ $(VENV)/.run

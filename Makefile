# `make demo` and `make test` each work alone on a machine with Python >= 3.11 and make: the first of them sets up.
#
# They use the virtualenv that $(PYTHON) belongs to, for example the active one, taken as it is. Else they make .venv, with
# the versions of constraints.txt. An installed torch is never replaced: .venv sees the one that $(PYTHON) has, if any.
# To choose: make test PYTHON=python3.12

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif
# Installed only where there is no torch; the version that the tests run with.
TORCH ?= torch==2.13.0
# A process a core with one computing thread each: small models are not faster with more.
# A file's tests stay in one process, since many share a run that they look at. Code is compiled once, not by each process.
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder
# What `make bench` times, and with which options of `pixtune bench`.
CONFIG ?= train_configs/demo.yaml
BENCH_ARGS ?= --steps 20 --text-tokens 40
# What `make mutants` and `make soak` draw by, and options of `scripts/mutants.py` (--again: the survivors of before).
SEED ?= 1
COUNT ?= 200
MUTANTS_ARGS ?=
# How long `make soak` takes, and the one run that it does.
SECONDS ?= 600
ONLY ?=

ENV := $(or $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")')),.venv)
PINS := $(if $(filter .venv,$(ENV)),-c constraints.txt)
PY := $(ENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# Another clone may share a virtualenv, so the stamp tells whose set-up it is.
STAMP := $(ENV)/.pixtune-set-up-$(shell pwd | cksum | cut -d' ' -f1)
HAS_TORCH := -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'

.PHONY: help demo demo-edit demo-flux ui test mutants soak hostile lint format bench bench-loop schema setup clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## train a style LoRA on the small model in assets/, 2 to 3 minutes on 2 CPU cores
	@$(PY) -m pixtune.cli train --config train_configs/demo.yaml

demo-edit: $(STAMP) ## the same for editing: redraw a picture in a new style
	@$(PY) -m pixtune.cli train --config train_configs/demo_edit.yaml

demo-flux: $(STAMP) ## the same with FLUX's classes
	@$(PY) -m pixtune.cli train --config train_configs/demo_flux.yaml

ui: $(STAMP) ## open the page in a browser, on the demo data and the small model; UI_ARGS="--port 7861" for others
	@$(PY) -m pixtune.cli ui $(UI_ARGS)

test: $(STAMP) ## the whole suite; make test PYTEST_ARGS="tests/unit -k config" for a part
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest $(PYTEST_ARGS)

mutants: $(STAMP) ## which mutations of the code no test notices; make mutants SEED=7 COUNT=200, an hour or two
	@$(PY) scripts/mutants.py --seed $(SEED) --count $(COUNT) $(MUTANTS_ARGS)

hostile: $(STAMP) ## some 1,200 hostile files and models through the commands, about 10 minutes; HOSTILE_ARGS="--seed 2"
	@OMP_NUM_THREADS=1 $(PY) -m tests.hostile $(HOSTILE_ARGS)

lint: $(STAMP) ## style, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(STAMP) ## bring the code into the form that lint asks for
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(STAMP) ## time training steps of the demo; make bench CONFIG=FILE BENCH_ARGS="--baseline before.json" for others
	@$(PY) -m pixtune.cli bench $(CONFIG) $(BENCH_ARGS)

bench-loop: $(STAMP) ## what the training loop costs over a bare one
	@$(PY) benchmarks/loop_overhead.py

soak: $(STAMP) ## random runs, interrupted and damaged for SECONDS, beside uninterrupted ones; SEED=1 ONLY=17 repeats one
	@OMP_NUM_THREADS=1 $(PY) -m tests.soak --seconds $(SECONDS) --seed $(SEED) $(if $(ONLY),--only $(ONLY))

schema: $(STAMP) ## write train_configs/schema.json, docs/config.md and docs/coming_from.md anew, after a change of keys
	@$(PY) -m pixtune.config.schema_file
	@$(PY) -m pixtune.migration.page

setup: $(STAMP) ## only set up

clean: ## remove what set-up, tools and the demo wrote; never a virtualenv of yours
	rm -rf .venv runs/demo runs/demo-edit runs/demo-flux .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) && echo --system-site-packages) $(ENV)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@$(PY) $(HAS_TORCH) || { echo "Installing $(TORCH) into $(ENV): none is there. CUDA builds are some gigabytes."; \
	  $(PIP) install -qq $(PINS) $(TORCH); }
	@echo "Installing pixtune and what it needs into $(ENV), once: 1 to 5 minutes."
	@$(PIP) install -qq $(PINS) -e '.[dev]'
	@rm -f $(ENV)/.pixtune-set-up-*
	@touch $@

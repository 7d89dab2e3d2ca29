.DEFAULT_GOAL := help
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null)
ifeq ($(UV),)
UV := .venv/bootstrap/bin/uv
endif
RUN := .venv/bin
OUT ?=
ONLY ?=
DATA ?=
PAIRS ?= 3
SECONDS ?= 15
SEEDS ?= 3

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/bootstrap/bin/uv:
	$(PYTHON) -m venv .venv/bootstrap && .venv/bootstrap/bin/python -m pip install --quiet uv

.venv/.ready: pyproject.toml requirements.lock
	@command -v uv >/dev/null || $(MAKE) --no-print-directory .venv/bootstrap/bin/uv
	test -x .venv/bin/python || $(UV) venv --allow-existing --python $(PYTHON) .venv
	VIRTUAL_ENV=.venv $(UV) pip install --require-hashes --compile-bytecode -r requirements.lock
	VIRTUAL_ENV=.venv $(UV) pip install --no-deps -e .
	touch $@

setup: .venv/.ready  ## make .venv with everything, from the lock file

demo: setup  ## start the one-machine stack, pretrain, fine-tune, compare, download the weights
	$(RUN)/tuneyard demo --out build/demo

up: setup  ## start the one-machine stack
	$(RUN)/tuneyard up

check: setup  ## format, lint, types, import contracts
	$(RUN)/ruff format --check . && $(RUN)/ruff check . && $(RUN)/pyright && $(RUN)/lint-imports --no-cache

test: setup  ## every test but the long ones
	$(RUN)/python -m pytest -n 2 --dist worksteal -m "not long"

test-long: setup  ## the long tests
	$(RUN)/python -m pytest -m long

bench: setup  ## measure against the other way (ONLY=name,name DATA=folder PAIRS=3 OUT=file; cifar_85 only if asked: ONLY=cifar_85 DATA=folder PAIRS=1 BUDGET=1850)
	VIRTUAL_ENV=.venv $(UV) pip install --quiet --require-hashes --no-deps -r tests/benchmarks/requirements.txt
	$(RUN)/python -m tests.benchmarks --out $(or $(OUT),build/bench.json) --pairs $(PAIRS) $(if $(BUDGET),--budget $(BUDGET)) $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA))

methods: setup  ## every unsupervised method after equal seconds of training (SECONDS=15 SEEDS=3 DATA=folder ONLY=name,name OUT=file)
	$(RUN)/python -m tests.benchmarks.methods --out $(or $(OUT),build/methods.json) --seconds $(SECONDS) --seeds $(SEEDS) $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA))

.PHONY: help setup demo up check test test-long bench methods

# Every target does its own set-up: a machine needs only Python 3.11 or newer and make.
# PYTHON=python3.13 VENV=.venv-3.13 uses another interpreter; PRESENCE_REDIS_URL=redis://... a server that already runs.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help demo test test-all check format bench prove clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "presence needs Python 3.11 or newer; $(PYTHON) is older or does not run. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up $(VENV) (once)..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Two game servers, one Redis, real Socket.IO clients: the main job, checked
	@$(RUN) -m examples.demo

test: $(READY)  ## The tests, against the first server that can be found
	@$(RUN) -m pytest

test-all: $(READY)  ## The tests, against every server that can be found
	@$(RUN) -m tests.all_servers

check: $(READY)  ## Lint, types, and the Lua scripts
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(RUN) -m tests.check_lua

format: $(READY)  ## Format the Python code and fix what ruff can fix
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: $(READY)  ## Four ways to keep presence, side by side: cost and scale (within 20 minutes; QUICK=1: within 3)
	@$(RUN) -m bench

prove: $(READY)  ## Every interleaving, a storm of a million operations and its history, long random sequences
	@$(RUN) -m bench.prove
	@PRESENCE_EXAMPLES=200 $(RUN) -m pytest tests/test_stateful.py

clean:  ## Remove what the other targets made, except the results of bench and prove
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` trains, evaluates and saves the demo model, `make test` runs the checks, and `make gpu` runs the numeric
# tests and the benchmarks on a GPU. All make a virtual environment in .venv first. `make clients` tests programs of others
# in an environment of its own. PIP_CONSTRAINT, where set, chooses the versions (of torch, say).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The whole suite runs in several workers; a plain `pytest tests/…` does not. Some tests wait for other processes, so there
# is one worker more than processors.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
IN_PARALLEL = -n $(WORKERS) --dist loadgroup
INSTALLED := $(VENV)/.installed
CLIENTS ?= .venv-clients

# Options of scripts/gpu.py: GPU='--only tests moe_layer', say.
GPU ?=

.PHONY: demo test tests check clients docs gpu install clean

demo: $(INSTALLED)
	$(BIN)/python scripts/train.py

test: check tests

tests: $(INSTALLED)
	$(BIN)/python -m pytest $(IN_PARALLEL)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Servers, exporters and harnesses of others, run with the models.
clients: $(CLIENTS)/.installed
	$(CLIENTS)/bin/python -m pytest tests/clients

# The site, in build/site. It needs only the `docs` extra, since the sources are read and not imported.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The documentation is in build/site/index.html"

# The numeric tests and the benchmarks; on the CPU, with small sizes, where there is no GPU.
gpu: $(INSTALLED)
	$(BIN)/python scripts/gpu.py $(GPU)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

$(CLIENTS)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -e '.[dev,clients]'
	touch $@

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/docs/requirements.py | xargs -d '\n' $(BIN)/python -m pip install
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) outputs build *.egg-info

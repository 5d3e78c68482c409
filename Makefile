# Two commands do everything: `make demo` trains, evaluates and saves the demo model; `make test` runs the checks.
# Both make a virtual environment in .venv first. PIP_CONSTRAINT, where set, chooses the versions (of torch, say).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The whole suite runs in several workers. A plain `pytest tests/…` does not.
IN_PARALLEL := -n auto --maxprocesses 4 --dist loadgroup
INSTALLED := $(VENV)/.installed

.PHONY: demo test check install clean

demo: $(INSTALLED)
	$(BIN)/python scripts/train.py

test: $(INSTALLED) check
	$(BIN)/python -m pytest $(IN_PARALLEL)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info

.PHONY: demo test check install

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed  ## the tested set of packages, in .venv

demo: install  ## the whole pipeline on the bundled model; ends with runs/demo/report.html
	$(BIN)/iapo demo --out runs/demo

test: install  ## the whole test suite
	$(BIN)/pytest

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

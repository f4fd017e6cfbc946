# What a person types. Everything runs in .venv, which `setup` makes from constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo screenshot test test-slow fuzz test-all lint format type check docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check \
		-c constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/packlight demo --output demo-out --overwrite

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

fuzz: setup
	$(BIN)/python tests/fuzz/harness.py --count 800 --minutes 5

test-all: setup
	$(BIN)/python -m pytest -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m pytest -n 0 tests/commands/test_help.py tests/recipe/test_schemas.py \
		--update-golden

screenshot: setup
	$(BIN)/python benchmarks/screenshot.py

check: lint type test

clean:
	rm -rf $(VENV) build dist demo-out compress/grids/__pycache__ *.egg-info .pytest_cache .mypy_cache .ruff_cache

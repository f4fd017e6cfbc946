# What a person types. Everything runs in .venv, made from constraints.txt: `demo` installs what a
# user needs, `setup` what a developer needs, too.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BASE   := $(VENV)/.installed-user
STAMP  := $(VENV)/.installed
NEXT   := .venv-transformers5
EVAL   := .venv-eval
COREAI := .venv-coreai
MLX    := .venv-mlx
NODE   := .venv-node

.PHONY: setup demo screenshot test test-slow test-transformers5 test-eval test-coreai test-mlx loaders fuzz test-all lint format type check docs clean

INSTALL = PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check \
	-c constraints.txt

setup: $(STAMP)

$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable .
	touch $(BASE)

$(STAMP): $(BASE)
	$(INSTALL) --editable ".[dev]"
	touch $(STAMP)

demo: $(BASE)
	$(BIN)/packlight demo --output demo-out --overwrite

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

fuzz: setup
	$(BIN)/python tests/fuzz/harness.py --count 800 --minutes 5

test-all: setup
	$(BIN)/python -m pytest -m ""

# What a checkpoint and the Hub are read with, in the next major version of those libraries; they have
# no part in the grids.
test-transformers5: $(NEXT)/.installed
	$(NEXT)/bin/python -m pytest tests/decoder tests/checkpoint tests/exporters/gguf \
		tests/output/test_publish.py -k "not every_kind_of_grid"

# A layer over .venv: its own packages come first, then .venv's, then this checkout.
$(NEXT)/.installed: $(STAMP) constraints-transformers5.txt
	$(PYTHON) -m venv $(NEXT)
	for site in $(CURDIR)/$(VENV)/lib/python3.*/site-packages; do \
		printf '%s\n' "$$site" $(CURDIR) > $(NEXT)/lib/$$(basename $${site%/*})/site-packages/below.pth; \
	done
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check --no-warn-conflicts \
		-c constraints-transformers5.txt "transformers>=5,<6"
	touch $@

# Transformers.js, for the tests of loaders (-m slow). Its scripts would fetch CUDA's libraries.
loaders: $(NODE)/.installed

$(NODE)/.installed:
	npm install --silent --ignore-scripts --no-save --prefix $(NODE) @huggingface/transformers@4.3.2
	touch $@

# lm-evaluation-harness (packlight[eval]) and its data sets, in a layer over .venv of the same form.
test-eval: $(EVAL)/.installed
	$(EVAL)/bin/python -m pytest -n 0 tests/harness

$(EVAL)/.installed: $(STAMP) constraints.txt
	$(PYTHON) -m venv $(EVAL)
	for site in $(CURDIR)/$(VENV)/lib/python3.*/site-packages; do \
		printf '%s\n' "$$site" $(CURDIR) > $(EVAL)/lib/$$(basename $${site%/*})/site-packages/below.pth; \
	done
	$(EVAL)/bin/pip install --quiet --disable-pip-version-check --no-warn-conflicts \
		-c constraints.txt lm-eval datasets
	touch $@

# Core AI (packlight[coreai]), in a layer over .venv of the same form.
test-coreai: $(COREAI)/.installed
	$(COREAI)/bin/python -m pytest -n 0 tests/exporters/coreai tests/exporters/test_families.py \
		tests/plan/test_file_bytes.py -k coreai -m "slow or not slow"

$(COREAI)/.installed: $(STAMP) constraints.txt
	$(PYTHON) -m venv $(COREAI)
	for site in $(CURDIR)/$(VENV)/lib/python3.*/site-packages; do \
		printf '%s\n' "$$site" $(CURDIR) > $(COREAI)/lib/$$(basename $${site%/*})/site-packages/below.pth; \
	done
	$(COREAI)/bin/pip install --quiet --disable-pip-version-check --no-warn-conflicts \
		-c constraints.txt coreai-core==1.0.0b3
	touch $@

# mlx-lm (packlight[mlx]) wants transformers 5: an environment of its own, which verification runs.
test-mlx: $(STAMP) $(MLX)/.installed
	PACKLIGHT_MLX_PYTHON=$(CURDIR)/$(MLX)/bin/python \
		$(BIN)/python -m pytest -m "slow or not slow" tests/exporters/mlx \
		tests/exporters/test_families.py -k "mlx"

$(MLX)/.installed:
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/pip install --quiet --disable-pip-version-check mlx-lm==0.32.2 \
		$$(test "$$(uname)" = Linux && echo "mlx[cpu]==0.32.4" || echo mlx==0.32.4)
	touch $@

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
	rm -rf $(VENV) $(NEXT) $(NODE) $(EVAL) $(COREAI) $(MLX) build dist demo-out compress/grids/__pycache__ *.egg-info .pytest_cache .mypy_cache .ruff_cache

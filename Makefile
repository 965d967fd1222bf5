# Everything here works from a clean clone: the first target that needs it makes .venv and installs the project there.
#
#   make demo     optimize a real BERT export, show what was fused, verify it, time it; the diff goes to demo-out/
#   make test     run the tests
#   make lint     style;  make format  puts it right
#   make types    types, strict
#   make docs     build the documentation into site/
#   make clean    remove what these targets made, .venv apart

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAGE := build/types

.PHONY: help demo test lint format types docs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

# An environment that was made without this Makefile is used as it is; only what is missing is installed.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "onnx-fusion needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1); say: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing onnx-fusion and its tools into $(VENV) (once; a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/fusion demo --output demo-out

test: $(STAMP)
	@$(BIN)/python -m pytest --numprocesses auto $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

# The type checker sees the tree as an installation lays it out, with patterns/ as fusion.patterns, and says the real paths.
types: $(STAMP)
	@rm -rf $(STAGE) && mkdir -p $(STAGE)/fusion
	@ln -s "$(CURDIR)"/fusion/* $(STAGE)/fusion/ && ln -sfn "$(CURDIR)/patterns" $(STAGE)/fusion/patterns
	@$(BIN)/mypy >$(STAGE)/report 2>&1; status=$$?; sed 's#$(STAGE)/fusion/patterns/#patterns/#; s#$(STAGE)/##' $(STAGE)/report; exit $$status

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

clean:
	@rm -rf build dist site demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

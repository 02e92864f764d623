PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test check clean

# Trains the demo: at most five minutes on two CPU cores. More options: see examples/train.py.
train: $(VENV)/.installed
	$(BIN)/accelerate launch examples/train.py

# Lints, then runs all tests.
test: check
	$(BIN)/pytest

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The tested versions (constraints.txt) in an environment of their own.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info

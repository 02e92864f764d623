PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test docs check wheel-check gpu-check clean

# Trains the demo: at most five minutes on two CPU cores. More options: see examples/train.py.
train: $(VENV)/.installed
	$(BIN)/accelerate launch examples/train.py

# Checks, then runs all tests, in as many processes as there are cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8

# Style and types; .pre-commit-config.yaml has the same for each commit.
check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The documentation site, in build/docs; a warning is an error.
docs: $(VENV)/.installed
	rm -rf docs/api
	$(BIN)/sphinx-build -q -E -W --keep-going docs build/docs

# Builds the wheel, looks what is in it, installs it elsewhere and uses it there.
wheel-check: $(VENV)/.installed
	$(BIN)/pytest tests/test_package.py

# On a machine with a GPU: the kernels' tests, then their table. Needs torch, triton, transformers, numpy and pytest, in
# the environment of PYTHON, and neither network nor installation.
RESULTS ?= benchmarks/results
gpu-check:
	PYTHONPATH=src $(PYTHON) -m pytest -q tests/modeling/test_coupling_triton.py tests/modeling/test_couplings.py -k triton
	PYTHONPATH=src $(PYTHON) benchmarks/couplings.py --output $(RESULTS)/couplings.jsonl

# The tested versions (constraints.txt) in an environment of their own.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs docs/api src/*.egg-info

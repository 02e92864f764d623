PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest

.PHONY: train test test-oldest docs check wheel-check gpu-check clean

# Trains the demo: at most five minutes on two CPU cores. A run that was stopped goes on. More options: see
# examples/train.py.
train: $(VENV)/.installed
	$(BIN)/python examples/train.py $(if $(wildcard runs/demo/checkpoint-*),--resume)

# Checks, then runs all tests, in as many processes as there are cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# The model's tests with the oldest transformers that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest --numprocesses auto --maxprocesses 8 --dist worksteal \
		tests/modeling tests/test_fixtures.py

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
	$(BIN)/pip install --constraint constraints.txt --editable ".[test]"
	touch $@

# Those versions, but for transformers and what goes with it, without the extras that these tests can do without.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -E '/^(huggingface_hub|tokenizers)==/d; s/^transformers==.*/transformers==5.17.0/' constraints.txt \
		> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[triton]" \
		mpmath pytest pytest-xdist scipy
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist runs docs/api src/*.egg-info

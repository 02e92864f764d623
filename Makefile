PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest

.PHONY: train test test-oldest test-torchao fuzz docs check wheel-check gpu-check study-ptb study-ptb-rates study-wikitext2 study-stacks results clean

# Trains the demo: five to ten minutes on two CPU cores. A run that was stopped goes on. More options: see
# examples/train.py.
train: $(or $(wildcard $(VENV)/.installed),$(VENV)/.installed-core)
	$(BIN)/python examples/train.py $(if $(wildcard runs/demo/checkpoint-*),--resume)

# Checks, then runs all tests, in as many processes as there are cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# The model's tests with the oldest transformers that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest --numprocesses auto --maxprocesses 8 --dist worksteal \
		tests/modeling tests/test_fixtures.py

# Configurations, batches and calls that the tests have not seen, until one fails or Ctrl-C.
fuzz: $(VENV)/.installed
	while FUZZ_EXAMPLES=500 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/test_fuzzing.py --numprocesses auto; do :; done

# torchao beside the environment, not in it: once installed, every import of transformers loads it, with warnings.
test-torchao: build/torchao/.installed
	PYTHONPATH=build/torchao OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_ecosystem.py -k torchao

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

# The rows of docs/results.md: a run that was stopped goes on, a row that is there is not made again. The texts' folders
# are given by PTB and WIKITEXT2; seeds by SEEDS. On CPU cores this takes hours.
PTB ?= ptb
WIKITEXT2 ?= wikitext2
SEEDS ?= 0 1 2
STUDY := $(BIN)/python benchmarks/study/run.py --runs runs/study
study-ptb: $(VENV)/.installed
	$(STUDY) $(PTB_OPTIONS) --test_samples 16 --cases discrete "Mix-d, one flow"
	$(STUDY) $(PTB_OPTIONS) --test_samples 4 --cases Mix-d Mix-1 affine
	$(STUDY) $(PTB_OPTIONS) --test_samples 1 --cases discrete "Mix-d, one flow" --seeds 1
	$(STUDY) $(PTB_OPTIONS) --num_steps 6000 --test_samples 1 --cases discrete "Mix-d, one flow"
	$(STUDY) $(PTB_OPTIONS) --hidden_size 128 --num_steps 12000 --learning_rate 0.004 --warmup_steps 200 \
		--initializer_range 0.06 --test_samples 1 --cases discrete "Mix-d, one flow"
	$(STUDY) $(PTB_OPTIONS) --hidden_size 128 --num_steps 8000 --batch_size 32 --optimizer muon --learning_rate 0.004 \
		--warmup_steps 200 --initializer_range 0.06 --test_samples 1 --cases discrete "Mix-d, one flow"

# How fast the two optimisers learn, by the validation text.
study-ptb-rates: $(VENV)/.installed
	$(STUDY) $(RATE_OPTIONS) --learning_rate 0.004
	$(STUDY) $(RATE_OPTIONS) --optimizer muon --learning_rate 0.0015
	$(STUDY) $(RATE_OPTIONS) --optimizer muon --learning_rate 0.003
	$(STUDY) $(RATE_OPTIONS) --optimizer muon --learning_rate 0.004 --num_steps 1500 --batch_size 32 --warmup_steps 100

RATE_OPTIONS = $(PTB_OPTIONS) --hidden_size 128 --num_steps 3000 --warmup_steps 200 --initializer_range 0.06 --test_samples 1 \
	--test_sequences 512 --output $(RESULTS)/ptb_rates.jsonl --cases discrete

PTB_OPTIONS = --dataset ptb:$(PTB) --num_steps 1200 --num_tokens 320 --latent_size 8 --learning_rate 0.003 --warmup_steps 60 \
	--test_sequences 3735 --output $(RESULTS)/ptb.jsonl

study-wikitext2: $(VENV)/.installed
	$(STUDY) --dataset wikitext2:$(WIKITEXT2) $(WORDS_OPTIONS) --output $(RESULTS)/wikitext2.jsonl \
		--cases discrete "Mix-d, one flow, equal blocks"

WORDS_OPTIONS = --num_tokens 64 --latent_size 16 --num_steps 4000 --batch_size 16 --optimizer muon --learning_rate 0.004 \
	--initializer_range 0.06 --test_sequences 3837 --test_samples 1

study-stacks: $(VENV)/.installed
	for task in addition addition-reversed sum-in-front checksum; do \
		$(STUDY) --dataset task:$$task $(TASK_OPTIONS) --seeds $(SEEDS) --output $(RESULTS)/stacks.jsonl \
			--cases discrete "Mix-d, one flow" "Mix-d, right to left" "Mix-d, half right to left" \
			"Mix-d, half right to left, progressive" || exit 1; \
	done
	$(STUDY) --dataset task:addition-reversed $(TASK_OPTIONS) --num_steps 3000 --optimizer muon --learning_rate 0.004 \
		--initializer_range 0.06 --output $(RESULTS)/stacks.jsonl --cases discrete "Mix-d, half right to left"
	$(STUDY) $(PATCH_OPTIONS) --seeds $(SEEDS) --cases discrete "Mix-d, one flow"
	$(STUDY) $(PATCH_OPTIONS) --seeds $(SEEDS) --groups "weak first flow"
	$(STUDY) $(PATCH_OPTIONS) --seeds $(SEEDS) --groups "patches under flows"
	$(BIN)/python benchmarks/study/above.py checkpoints/doyle --seeds $(SEEDS) --runs runs/above --output $(RESULTS)/stacks.jsonl

TASK_OPTIONS = --hidden_size 32 --num_tokens 16 --latent_size 4 --num_steps 600 --batch_size 64 --learning_rate 0.003 \
	--test_sequences 1000 --test_samples 4
PATCH_OPTIONS = --num_steps 600 --initializer_range 0.06 --test_samples 4 --output $(RESULTS)/stacks.jsonl

# The page and the picture of these rows.
results: $(VENV)/.installed
	$(BIN)/python benchmarks/study/results.py --rows $(RESULTS)

# The tested versions (constraints.txt) in an environment of their own.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[test]"
	touch $@

build/torchao/.installed: $(VENV)/.installed
	rm -rf build/torchao
	$(BIN)/pip install --quiet --no-deps --target build/torchao torchao==0.18.0
	touch $@

# What training needs, where not everything is installed yet.
$(VENV)/.installed-core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[numba]"
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

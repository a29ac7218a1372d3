# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit interpreter exhaustive bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/lamkernels demo --out demo-out $(DEMO)

test: lint types unit interpreter

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10

# a process of its own: Triton reads the variable when a kernel is defined
interpreter: $(VENV)/.dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/interpreter

# every tile of tuning.py on every target: before a release, or after a change to a Triton kernel
exhaustive: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m exhaustive

bench: $(VENV)/.dev
	$(BIN)/lamkernels bench $(BENCH)

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

PYTHON ?= python3
BIN := .venv/bin
RUN := checkpoints/quickstart

.PHONY: demo test test-slow bench lint setup clean

demo: setup  ## built-in scenes from start to end: render, train, evaluate, draw
	$(BIN)/python train.py --config configs/quickstart.yaml
	$(BIN)/python evaluate.py $(RUN)/best.ckpt --figures $(RUN)/figures --json $(RUN)/evaluation.json
	@echo "The figures are in $(RUN)/figures; start with predictions.png."

test: setup  ## lint and unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup  ## inject faults for an hour and a half; docs/reliability.md
	$(BIN)/python -m pytest -m slow --durations=0

bench: setup  ## measure everything against plain code: docs/benchmarks.md; tens of minutes, on a quiet machine
	$(BIN)/python -m benchmarks

setup: .venv/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1) as $(PYTHON); try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up .venv (torch is a large download; a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:  ## remove the environment and caches; keep data and checkpoints
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

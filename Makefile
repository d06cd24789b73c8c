PYTHON ?= python3
BIN := .venv/bin
RUN := checkpoints/quickstart

.PHONY: demo test test-slow bench lint setup clean

demo: setup  ## the main job on built-in scenes: render, train, evaluate, draw
	$(BIN)/python train.py --config configs/quickstart.yaml
	$(BIN)/python evaluate.py $(RUN)/best.ckpt --figures $(RUN)/figures --json $(RUN)/evaluation.json
	@echo "The pictures are in $(RUN)/figures; start with predictions.png."

test: setup  ## style, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-slow: setup  ## kills, faults and loads over and over, half an hour of soak among them; docs/reliability.md
	$(BIN)/python -m pytest -m slow --durations=0

bench: setup  ## times everything against the plain way: docs/benchmarks.md; some tens of minutes, on a quiet machine
	$(BIN)/python -m benchmarks

setup: .venv/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setpred needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up .venv (torch is a large download; a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:  ## the environment and caches; data and checkpoints stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

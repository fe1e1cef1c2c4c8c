PYTHON ?= python3
BIN := .venv/bin
ifeq ($(OS),Windows_NT)
PYTHON := python
BIN := .venv/Scripts
endif
READY := .venv/ready

.PHONY: help run test check test-browser lab refresh faults mutation

help:     ## this list
	@grep -E "^[a-z-]+: .*##" Makefile | sed -E "s/:[^#]*## /:	/"

run: $(READY)  ## execute every notebook in order; copies and HTML pages go to build/
	$(BIN)/python scripts/run_notebooks.py

test: $(READY)  ## check every output, every figure and the helpers
	$(BIN)/python -m pytest

check: $(READY)  ## for contributors, in two minutes: style, documents, exercises and helpers, without running the notebooks
	$(BIN)/python -m pip install --quiet ruff==0.17.6
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m pytest tests

test-browser: $(READY)  ## run the series in JupyterLab and look at GitHub's pages, in Chromium; screenshots go to build/browser/
	$(BIN)/python -m pip install --quiet --editable .[browser]
	$(BIN)/python -m pytest tests/browser

lab: $(READY)  ## open the series in JupyterLab
	$(BIN)/python -m jupyter lab --LabApp.default_url=/lab/tree/notebooks

refresh: $(READY)  ## for maintainers: make the committed outputs, solutions, figures, results and tables anew
	$(BIN)/python scripts/write_badges.py
	$(BIN)/python scripts/draw_concepts.py
	$(BIN)/python scripts/write_solutions.py
	$(BIN)/python scripts/run_notebooks.py --in-place
	$(BIN)/python -m scripts.draw_readme
	$(BIN)/python -m scripts.write_readme

faults: $(READY)  ## plant one fault of each kind in a copy; the tests must catch them all
	$(BIN)/python tests/plant_faults.py

mutation: $(READY)  ## change the lrf_*.py line by line; the tests must notice
	$(BIN)/python -m pip install --quiet mutmut
	$(BIN)/python -m mutmut run
	$(BIN)/python -m mutmut results

# The script writes the stamp last, and begins a set-up that was cut off again.
$(READY): pyproject.toml
	@$(PYTHON) scripts/set_up.py

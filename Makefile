# Each target sets up .venv first, when needed. NB picks notebooks by the start of their names:
# `make run NB=03` runs lesson 3 and its solutions, `make test NB="0[1-4]"` tests lessons 1 to 4.
PYTHON ?= python3
BIN := .venv/bin
ifeq ($(OS),Windows_NT)
PYTHON := python
BIN := .venv/Scripts
endif
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# Two processes of one thread each take less time than two of two, which wait for each other.
export OMP_NUM_THREADS ?= 1

ifdef NB
CHOSEN := $(wildcard notebooks/$(NB)*.ipynb notebooks/*/$(NB)*.ipynb)
$(if $(CHOSEN),,$(error no notebook has a name that starts with $(NB)))
endif

.PHONY: help lab run test check refresh browser

help:  ## this list
	@grep -E "^[a-z]+:.*##" Makefile | sed -E "s/:[^#]*## /:	/"

lab: .venv/ready  ## open the series in JupyterLab
	$(BIN)/python -m jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb

run: .venv/ready  ## run every notebook; copies and web pages go to build/ (one lesson: NB=03)
	$(BIN)/python -m tools.run_notebooks "$(NB)"

test: .venv/ready-dev  ## run the notebooks again, compare every output, test the code (one lesson: NB=03)
	$(PYTEST) $(CHOSEN)

check: .venv/ready-dev  ## what needs no notebook to run: style and the tests of the code
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(PYTEST) tests

refresh: .venv/ready-dev  ## for authors: rewrite the stored outputs, results and README (one lesson: NB=03)
	$(BIN)/python -m tools.run_notebooks --in-place "$(NB)"
	$(if $(NB),,$(BIN)/python -m tools.pictures)
	$(BIN)/python -m tools.readme

browser: .venv/ready-dev  ## run the notebooks in JupyterLab, in Chromium; screenshots go to build/browser/
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m pytest tests/browser.py $(if $(NB),-k $(NB))

.venv/ready: pyproject.toml tools/set_up.py
	@$(PYTHON) tools/set_up.py

.venv/ready-dev: pyproject.toml tools/set_up.py .pre-commit-config.yaml
	@$(PYTHON) tools/set_up.py dev

# Needs Python 3.11 or later, git and make. `make PYTHON=python3.12 test` picks another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NAME := first_colbert
# a trained checkpoint for make interop; the tutorial's, where make tutorial made it
TRAINED ?= $(wildcard runs/$(NAME)/best)

.PHONY: help tutorial test interop lab docs readme clean

help:
	@echo "make tutorial   train a first ColBERT on this machine and show the results (about 12 minutes)"
	@echo "make test       run every notebook's checks and tests/"
	@echo "make interop    load checkpoints in colbert-ai, RAGatouille, PyLate and sentence-transformers and compare (10 GB of environments the first time)"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make docs       build the site into _docs; with Quarto where it is installed"
	@echo "make readme     write README.md from nbs/index.ipynb"
	@echo "make clean      remove what the other targets made, but for $(VENV) and runs/"

$(VENV)/.installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or later is needed, $(PYTHON) is {v[0]}.{v[1]}: name another with make PYTHON=...") if v < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

tutorial: $(VENV)/.installed
	$(BIN)/python scripts/notebooks.py tutorial nbs/tutorials/$(NAME).ipynb --out runs/$(NAME)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

interop: $(VENV)/.installed
	$(BIN)/python tests/interop/run.py $(if $(TRAINED),--trained $(TRAINED))

# tqdm misses ipywidgets and says so in the first cell that imports it; its bars are plain text without, which is what a notebook can keep
lab: $(VENV)/.installed
	PYTHONWARNINGS="$${PYTHONWARNINGS-ignore:IProgress not found}" $(BIN)/jupyter lab nbs

docs: $(VENV)/.installed
	$(BIN)/python scripts/site_build.py

readme: $(VENV)/.installed
	$(BIN)/python scripts/notebooks.py readme

clean:
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .hypothesis nbs/nbdev.yml
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

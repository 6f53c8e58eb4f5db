# Two commands to know: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS ?= .venv-clients
DOCS ?= .venv-docs
OUT ?= runs/demo
SIZE ?= full
DATA ?=

.PHONY: demo routes test clients docs site fuzz wheel lint bench report figures evidence install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or later is needed, got ' + sys.version)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/chronomoe run demo --out $(OUT)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadgroup

# AutoGluon needs a transformers older than the one we test with, hence an environment of its own.
clients: $(CLIENTS)/.installed
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest tests/clients -W ignore

$(CLIENTS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade pip
	$(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[autogluon]'
	$(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[darts,fev,gluonts,lora,sktime]' \
		beartype hypothesis pytest pytest-xdist statsforecast
	touch $@

# The documentation, served at http://127.0.0.1:8000; `make site` writes it and refuses broken links.
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs serve --strict

site: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict --site-dir build/site

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet $$($(PYTHON) -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

# 5,000 drawn inputs in all; the tests draw a few hundred.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=560 $(BIN)/python -m pytest tests/fuzz

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# On cores that do nothing else, in about half an hour; docs/speed.md has the table.
bench: $(STAMP)
	$(BIN)/python tools/run_benchmarks.py

report: $(STAMP)
	$(BIN)/chronomoe report $(OUT)

# The stages that both recipes share are taken over, not made twice.
routes: demo
	rm -rf $(OUT)-routes
	cp -r $(OUT) $(OUT)-routes
	$(BIN)/chronomoe run demo-routes --out $(OUT)-routes

figures: evidence
	$(BIN)/python tools/update_readme.py runs/evidence-full

# Every table of docs/results.md, from runs: hours at full size; SIZE=small takes minutes and only shows that it works.
# DATA names a folder of the public files listed in tools/evidence.yaml; without it, what needs them is left out.
evidence: $(STAMP)
	$(BIN)/python tools/evidence.py --size $(SIZE) --out runs/evidence-$(SIZE) $(if $(DATA),--data $(DATA)) \
		--write $(if $(filter full,$(SIZE)),docs/results.md,runs/evidence-$(SIZE)/results.md)

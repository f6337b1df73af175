# Each target makes its own environment (.venv) on a machine that has Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The same with the newest TransformerLens that still has HookedTransformer.
VENV3 := .venv-tl3
TRANSFORMER_LENS_3 := 3.9.0
# The suite runs on one thread each; a file's tests stay together, because they share models.
WORKERS := -n 2 --dist loadfile
PIP := python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-tl3 matrix matrix-tl3 check docs docs-check release-check clean

demo: $(VENV)/ready
	$(BIN)/rmtension demo --overwrite

test: $(VENV)/ready
	$(BIN)/python -m pytest $(WORKERS)

# Tables, figures, pages and what teaches do not touch TransformerLens: they are tested once.
SAME := $(addprefix --ignore=tests/test_,html_report.py report.py plots.py notebooks.py repr_html.py docstrings.py intervals.py)

test-tl3: $(VENV3)/ready
	$(VENV3)/bin/python -m pytest -p no:cacheprovider $(WORKERS) $(SAME)

# Which families of reward models open, and how exactly: fails if one that opens is further than 1e-4 off.
matrix: $(VENV)/ready
	$(BIN)/python -m rmtension.check_matrix

matrix-tl3: $(VENV3)/ready
	$(VENV3)/bin/python -m rmtension.check_matrix

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, into site/: any warning is an error, and nothing in it may be fetched from elsewhere. Not with --quiet, under
# which --strict sees no warnings.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tests/built_site.py site

# What the documentation says, run (the suite does too), and counted.
docs-check: $(VENV)/ready
	$(BIN)/python tests/documented.py
	$(BIN)/python -m pytest tests/test_docs.py tests/test_docstrings.py

# Whether the tag of this commit, pyproject.toml, CITATION.cff and CHANGELOG.md name one version.
release-check: $(VENV)/ready
	$(BIN)/python tests/release.py

# torch first and by its pin: an open range would be resolved to a build with gigabytes of CUDA libraries.
$(VENV)/ready: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --constraint constraints.txt torch
	$(BIN)/$(PIP) --constraint constraints.txt --editable ".[dev,docs]"
	touch $@

$(VENV3)/ready: pyproject.toml constraints.txt
	test -d $(VENV3) || $(PYTHON) -m venv $(VENV3)
	sed 's/^transformer-lens==.*/transformer-lens==$(TRANSFORMER_LENS_3)/' constraints.txt > $(VENV3)/constraints.txt
	$(VENV3)/bin/$(PIP) --constraint $(VENV3)/constraints.txt torch
	$(VENV3)/bin/$(PIP) --constraint $(VENV3)/constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV3) rmtension-demo real-pairs dist build site

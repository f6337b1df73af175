# Each target makes its own environment (.venv) on a machine that has Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The same with the newest TransformerLens that still has HookedTransformer.
VENV3 := .venv-tl3
TRANSFORMER_LENS_3 := 3.9.0
# transformers 4, and RewardBench with the release of it that its own pins.
VENV4 := .venv-tf4
VENV_REWARDBENCH := .venv-rewardbench
REWARDBENCH := 0.1.4
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Two workers of one thread each. Each begins with half of the suite, in order, because neighbours share models; who is
# done first takes half of what the other has left.
WORKERS := -n 2 --dist worksteal
# pytest's options of pyproject.toml without the type checker.
UNCHECKED := -o addopts=--strict-markers
# Without compiling all of it, which takes longer than compiling what is imported.
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-all test-tl3 matrix matrix-tl3 exports check docs docs-check release-check clean

demo: $(VENV)/ready
	$(BIN)/rmtension demo --overwrite

# Every law once: without the grid over families, sites and positions, and without whole programs. Types and shapes,
# whose checks take a quarter of the time, are left to `make test-all`.
test: $(VENV)/ready
	$(BIN)/python -m pytest $(UNCHECKED) $(WORKERS) -m "not grid and not typed"

# Every law with types and shapes checked, then the grid, which calls the same functions, without.
test-all: $(VENV)/ready
	$(BIN)/python -m pytest $(WORKERS) -m "not grid"
	$(BIN)/python -m pytest $(UNCHECKED) $(WORKERS) -m grid

# What reaches TransformerLens only by opening a model, as the other tests do, or not at all: it is tested once.
SAME := $(patsubst %,--ignore-glob='*/test_%.py', \
  arguments behaviour benchmarks cli conflict constants correlated describe distributed \
  docstrings down_projection dpo encoders evaluation examples faithfulness faithfulness_plot files \
  fine_tune fuzz gains head_errors html_report inspection inspection_page intervals kept_curves kinds \
  local_names native_body neuron_commands neurons notebooks organisms output_sums outputs_of_one_model \
  overlap package packed_training pairs plots preference_format process progress reading recovery \
  refit refusals regmean repair repair_page replication report repr_html segments set_effects shared \
  storage study text_models threads tokens training work world)

# Every law once, and the grid where families, bridges and hooks are TransformerLens' own (the marker `lens`).
test-tl3: $(VENV3)/ready
	$(VENV3)/bin/python -m pytest $(UNCHECKED) -p no:cacheprovider $(WORKERS) -m "not grid or lens" $(SAME)

# Which families of reward models open, and how exactly: fails if one that opens is further than 1e-4 off.
matrix: $(VENV)/ready
	$(BIN)/python -m rmtension.synthetic.check_matrix

matrix-tl3: $(VENV3)/ready
	$(VENV3)/bin/python -m rmtension.synthetic.check_matrix

# Whether transformers 4 and RewardBench read what is exported as transformers 5 does: fails if a reward is 1e-5 off.
exports: $(VENV)/ready $(VENV4)/ready $(VENV_REWARDBENCH)/ready
	rm -rf build/exports
	$(BIN)/python tests/programs/other_major.py write build/exports/families
	$(VENV4)/bin/python tests/programs/other_major.py compare build/exports/families
	$(VENV_REWARDBENCH)/bin/python tests/programs/other_major.py compare build/exports/families
	$(BIN)/python tests/programs/on_rewardbench.py write build/exports/pairs
	$(VENV_REWARDBENCH)/bin/python tests/programs/on_rewardbench.py score build/exports/pairs

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, into site/: any warning is an error, and nothing in it may be fetched from elsewhere. Not with --quiet, under
# which --strict sees no warnings.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tests/programs/built_site.py site

# What the documentation says, run (the suite does too), and counted.
docs-check: $(VENV)/ready
	$(BIN)/python tests/programs/documented.py
	$(BIN)/python -m pytest tests/test_docs.py tests/test_docstrings.py

# Whether the tag of this commit, pyproject.toml, CITATION.cff and CHANGELOG.md name one version.
release-check: $(VENV)/ready
	$(BIN)/python tests/programs/release.py

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

$(VENV4)/ready: constraints.txt
	test -d $(VENV4) || $(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/$(PIP) --constraint constraints.txt torch numpy
	$(VENV4)/bin/$(PIP) "torch==$(TORCH)" "transformers==4.57.*"
	touch $@

# What its command imports, without what it pins beside transformers for other uses (vllm, bitsandbytes).
$(VENV_REWARDBENCH)/ready: constraints.txt
	test -d $(VENV_REWARDBENCH) || $(PYTHON) -m venv $(VENV_REWARDBENCH)
	$(VENV_REWARDBENCH)/bin/$(PIP) --constraint constraints.txt torch numpy
	$(VENV_REWARDBENCH)/bin/$(PIP) "torch==$(TORCH)" "transformers==4.51.0" \
		accelerate "datasets<6" "fschat==0.2.36" pandas sentencepiece "setuptools<81" "trl<0.20" wandb
	$(VENV_REWARDBENCH)/bin/$(PIP) --no-deps "rewardbench==$(REWARDBENCH)"
	touch $@

clean:
	rm -rf $(VENV) $(VENV3) $(VENV4) $(VENV_REWARDBENCH) rmtension-demo dist build site

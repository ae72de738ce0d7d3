# make demo        train a captioner on drawings of coloured shapes, score it, write a page with its captions
# make test        lint, type checks and tests
# make bench       how fast steps, searches and whole jobs are here, beside PyTorch; some twenty minutes on two cores
# make docs        the site, in build/docs, and the notebook run for it; what is wrong with a link is an error
# make dist        source package and wheel, in dist
# make tpu-check   what the TPU's compiler makes of the programs, without a TPU; over an hour on two cores
#
# Each installs into $(VENV) first. Needs Python 3.11 or later: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
# extras (see setup.cfg) that `make test` installs: make test EXTRAS=test,java,torch
EXTRAS ?= test
# A test that waits for ever says after 15 minutes where, and ends its worker. A worker that ended is not replaced: its test
# would be run again, up to four times for each worker, and pytest-xdist may then wait for ever itself.
PYTEST_FLAGS ?= --numprocesses=auto --dist=loadfile --max-worker-restart=0 \
	-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

BIN = $(VENV)/bin

.PHONY: demo test docs dist bench tpu-check
.DELETE_ON_ERROR:  # a virtual environment that was only half made is made again

# On CPUs, XLA takes the memory of every step anew: huge pages save the kernel most of that work.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
# It scores the latest checkpoint: the best by CIDEr may be an earlier one, as each scene has captions of several
# wordings, and which of them is written weighs more there than a wrong colour.
demo: $(VENV)/installed
	$(BIN)/python train.py
	$(BIN)/python evaluate.py --checkpoint=latest --overwrite

test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest $(PYTEST_FLAGS)

# From scratch, as a page that is not read again is not warned of again.
docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env docs build/docs

dist: $(VENV)/installed-dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: $(VENV)/installed-test,torch
	$(BIN)/python benchmarks/device.py
	$(BIN)/python benchmarks/jobs.py

# With TPU_FLAGS (see --help of the program) it only prints; without, what it prints becomes a table in docs/performance.md.
tpu-check: SHELL = /bin/bash
tpu-check: $(VENV)/installed-tpu
	set -o pipefail; $(BIN)/python benchmarks/tpu_compile.py $(TPU_FLAGS) | tee $(VENV)/tpu.jsonl
ifndef TPU_FLAGS
	mv $(VENV)/tpu.jsonl benchmarks/results/tpu.jsonl
	$(BIN)/python benchmarks/performance.py
endif

# Empty files that say which installation is up to date.
$(VENV)/installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/installed-%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# make run                                     the four notebooks on the built-in demo corpus
# make run DATA=folder ARGS="-p epochs 5"      ... on the corpus in that folder, with parameters
# make test                                    all tests        (make test ARGS="-k metrics" for some)
# make sync                                    bring each notebook's .py and .ipynb together
# make bench                                   timings, which no test asserts
# make test-gpu                                all tests on a machine with a GPU, where none of them is skipped

SHELL := /bin/bash
DATA ?=
ARGS ?=
PYTHON ?=
FROM := $(PWD)
VENV := .venv
BIN := $(VENV)/bin/python

.PHONY: run test sync bench test-gpu install
.DEFAULT_GOAL := run

# A relative DATA means what it means where the user stands, also with `make -C`.
run: install
	@here="$$PWD"; cd "$(FROM)" && "$$here/$(BIN)" "$$here/notebooks/run.py" --data "$(DATA)" $(ARGS)

test: install
	@$(BIN) -m ruff check .
	@$(BIN) -m pytest $(ARGS)

sync: install
	@$(BIN) -m jupytext --sync notebooks/[0-9]*.py notebooks/monitor.py

bench: install
	@for script in tests/benchmarks/*.py; do \
		echo "== $$script"; PYTHONPATH=. $(BIN) "$$script" $(ARGS) || exit 1; \
	done

test-gpu: install
	@$(BIN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make: PyTorch sees no GPU here")'
	@$(BIN) -m pytest $(ARGS)

# The environment is made once and brought up to date only when what it is made from changes. The copy of that is put
# there last, so that an interrupted install is taken up again. The package is installed as a link to its source, so
# that `python -m deepfake_utils` and `import deepfake_utils` work from anywhere.
install:
	@cat requirements.txt pyproject.toml | cmp -s - $(VENV)/installed && $(BIN) -c '' 2>/dev/null && exit 0; \
	fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.12 python3.11 python3.13 python3.14); do \
		"$$python" -c "$$fits" 2>/dev/null && found="$$python" && break; \
	done; \
	if [ -z "$$found" ]; then \
		echo "make: no Python 3.11 to 3.14 with the venv module found; install one (Debian: python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 2; \
	fi; \
	set -e; \
	{ $(BIN) -c "$$fits" && $(BIN) -m pip --version; } >/dev/null 2>&1 || "$$found" -m venv --clear $(VENV); \
	echo "Installing requirements.txt into $(VENV) with $$("$$found" --version) (once; about 5 GB, a few minutes)"; \
	[ -t 1 ] || quiet=--quiet; \
	$(BIN) -m pip install $$quiet --disable-pip-version-check -r requirements.txt; \
	$(BIN) -m pip install $$quiet --disable-pip-version-check --no-deps -e .; \
	cat requirements.txt pyproject.toml > $(VENV)/installed

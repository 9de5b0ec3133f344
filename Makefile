# Two commands need nothing but Python 3.11 and make: `make hunt` and `make test`.
PYTHON ?= python3
VENV := .venv
PYTEST ?= $(VENV)/bin/pytest
PIP := $(VENV)/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: hunt test test-gpu power check clean

hunt: $(VENV)/.hunt  ## hunt the attention kernels on whatever device is here, quickly, and say where the report is
	$(PYTEST) --kernel-suite=attention --kernel-profile=quick

# Tests run two at a time, and threads of both would wait for each other's.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev  ## the tests of kerneltest itself, and every bug ever found, replayed
	$(PYTEST) fixtures -rs
	$(PYTEST) tests -m "not gpu" -n 2 --dist loadfile --ignore tests/zoo
	$(PYTEST) tests/zoo  # alone: how far a crash is shrunk is a matter of time

test-gpu:  ## the tests that need a GPU; PYTEST="python3 -m pytest -p kerneltest.plugin" runs them without an installation
	$(PYTEST) tests -m gpu

power: $(VENV)/.hunt  ## what the oracle detects; POWER=--quick in under a minute
	$(VENV)/bin/kerneltest power $(POWER)

check: $(VENV)/.dev  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.hunt: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable ".[triton]"
	touch $@

$(VENV)/.dev: $(VENV)/.hunt
	$(PIP) --editable ".[dev]"
	touch $@

# Each target installs what it needs into .venv, once: `demo` the light core, `lab` and `docs` what they need,
# the others everything.

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := DS_BUILD_OPS=0 $(PYTHON) -m pip install --quiet --constraint constraints.txt
SOURCE := data/gpt_tp2_pp2_dp2

# The Python that .venv is made from: the first of these that is new enough. Or say `make BASE_PYTHON=...`.
CANDIDATES := python3 python3.11 python3.12 python3.13 python3.14
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
BASE_PYTHON ?= $(shell for python in $(CANDIDATES); do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)

# Jupyter refuses root, who is all that there is in many containers, unless told.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# Processes that tests start read compiled modules, also where containers say that none be written.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo lab docs test check lint bench data notebooks clean

demo: $(VENV)/core.stamp
	rm -rf demo-out
	$(VENV)/bin/ckptlab info $(SOURCE)
	$(VENV)/bin/ckptlab plan $(SOURCE) --tp 4 --pp 1 --dp 1
	$(VENV)/bin/ckptlab convert $(SOURCE) demo-out/gpt_tp4_pp1_dp1 --to deepspeed --tp 4 --pp 1 --dp 1
	$(VENV)/bin/ckptlab diff $(SOURCE) demo-out/gpt_tp4_pp1_dp1
	@echo 'demo-out/gpt_tp4_pp1_dp1 is the same checkpoint on another mesh. Next: `make lab`.'

lab: $(VENV)/lab.stamp
	$(VENV)/bin/jupyter lab $(AS_ROOT) notebooks/00_tour.ipynb

docs: $(VENV)/docs.stamp
	$(PYTHON) docs/site.py

# Two workers: a third that fills their waits imports and compiles everything once more, which takes longer.
test: $(VENV)/full.stamp
	$(PYTHON) -m pytest -n 2 --dist worksteal

check: $(VENV)/full.stamp
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow and not deepspeed"

lint: $(VENV)/full.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(VENV)/full.stamp
	set -e; for script in benchmarks/bench_*.py; do $(PYTHON) $$script; done

notebooks: $(VENV)/full.stamp
	$(PYTHON) notebooks/run.py

data: $(VENV)/full.stamp
	$(PYTHON) data/foundry/make.py

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/made.stamp:
	@test -n "$(BASE_PYTHON)" || { echo "make: no Python 3.11 or newer among $(CANDIDATES)"; exit 1; }
	rm -rf $(VENV)
	$(BASE_PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/core.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/lab.stamp: $(VENV)/core.stamp
	$(PIP) --editable '.[lab]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/core.stamp
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/full.stamp: $(VENV)/core.stamp tests/toy/pyproject.toml
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps ./tests/toy
	touch $@

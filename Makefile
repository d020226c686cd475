# Needs python3 (3.11 or later) with its venv module, and nothing else: each target installs what it uses.
# .venv has what a user of the package has, and pytest; .venv-dev has all the tools.  The tests of the live page look for
# chromium and chromedriver, and are skipped without (Debian: chromium, chromium-driver).

PYTHON ?= python3
VENV := .venv
DEV := .venv-dev
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PYTEST = $(VENV)/bin/python -m pytest

.PHONY: help demo test test-slow chaos test-all-pythons test-lowest package lint format type mypy verify-types docs bench bench-quick bench-parts clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-25s%s\n", $$1, $$2 }'

demo: $(VENV)/.for-demo  ## run the demo
	$(VENV)/bin/python examples/demo.py
	$(VENV)/bin/python examples/compare_servers.py

test: $(VENV)/.for-test  ## run the tests, all but the slow ones; ARGS="..." goes to pytest
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.for-test  ## run the slow tests
	$(PYTEST) -m slow $(ARGS)

chaos: $(VENV)/.for-test  ## kill workers at random for some minutes, and see that no call is lost
	CPUPOOL_CHAOS_CALLS=50000 $(PYTEST) -s tests/test_chaos.py $(ARGS)

test-all-pythons: $(DEV)/.for-all  ## run the tests on each of Python 3.11, 3.12 and 3.13 that is here
	$(DEV)/bin/nox -s tests

test-lowest: $(DEV)/.for-all  ## run the tests with the lowest versions of the dependencies
	$(DEV)/bin/nox -s lowest

package: $(DEV)/.for-all  ## build sdist and wheel, and test the wheel in an environment of its own
	$(DEV)/bin/nox -s package

lint: $(DEV)/.for-all  ## check rules and formatting
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .

format: $(DEV)/.for-all  ## mend formatting, and what rules can mend by themselves
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

type: mypy verify-types  ## check the types, and that every public name has one

mypy: $(DEV)/.for-all
	$(DEV)/bin/mypy

verify-types: $(DEV)/.for-all
	PATH="$(CURDIR)/$(DEV)/bin:$$PATH" basedpyright --verifytypes cpupool --ignoreexternal

docs: $(DEV)/.for-all  ## build the documentation in docs/_build/html; any warning is an error
	$(DEV)/bin/python -m sphinx -W -n --keep-going -b html docs docs/_build/html

bench-quick: $(DEV)/.for-all  ## compare with the peers, in under two minutes
	$(DEV)/bin/python benchmarks/compare.py --quick $(ARGS)

bench: $(DEV)/.for-all  ## compare with the peers in everything, in under fifteen minutes; ARGS="--write docs/benchmarks"
	$(DEV)/bin/python benchmarks/compare.py $(ARGS)

bench-parts: $(DEV)/.for-all  ## measure single parts of it in more detail
	$(DEV)/bin/python benchmarks/round_trip.py
	$(DEV)/bin/python benchmarks/stopping.py
	$(DEV)/bin/python benchmarks/lives.py
	$(DEV)/bin/python benchmarks/many_items.py
	$(DEV)/bin/python benchmarks/web.py
	$(DEV)/bin/python benchmarks/seeing_inside.py
	$(DEV)/bin/python benchmarks/large_data.py

clean:  ## remove all that was installed and built
	rm -rf .venv .venv-dev .nox build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --- what the targets need; each is made again when pyproject.toml has changed ---

$(VENV)/.for-demo: pyproject.toml | $(VENV)/pyvenv.cfg
	$(VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'  # the first with --group
	$(VENV)/bin/python -m pip install --quiet -e . --group demo
	@touch $@

$(VENV)/.for-test: pyproject.toml | $(VENV)/pyvenv.cfg
	$(VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)/bin/python -m pip install --quiet -e '.[cli]' --group test
	@touch $@ $(VENV)/.for-demo

$(DEV)/.for-all: pyproject.toml | $(DEV)/pyvenv.cfg
	$(DEV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(DEV)/bin/python -m pip install --quiet -e '.[cli]' --group dev
	@touch $@

%/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: there is no $(PYTHON) here; install Python 3.11 or later, or name one: make PYTHON=/path/to/python" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: cpupool needs Python 3.11 or later, and $(PYTHON) is not (`$(PYTHON) --version 2>&1`);" \
	        "install one, or name one: make PYTHON=/path/to/python" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $*
	@echo '*' > $*/.gitignore

# Every target sets up what it needs: a virtual environment in .venv with the pinned packages of constraints.txt,
# and this checkout installed into it. Needs Python 3.10 or later and make; another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

SOURCES := worldflux envs agents tests examples benchmarks
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format type docs clean

help:
	@echo "make demo       train DreamerV3 on CartPole and draw what it learned, in demo/"
	@echo "make test       the tests; make test-slow also runs those that train for minutes"
	@echo "make lint       style; make format repairs it"
	@echo "make type       types, checked on the package as it is installed"
	@echo "make docs       the documentation, in build/site; any warning is an error"
	@echo "make setup      only the virtual environment"
	@echo "make clean      remove what these targets made"

setup: $(READY)

# The stamp is written last: a set-up that was cut off starts again, one that is complete is reused.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10. Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing worldflux and its pinned packages into $(VENV); the first time takes minutes ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: $(READY)
	@$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(READY)
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "slow or not slow"

lint: $(READY)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

format: $(READY)
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

# envs/ and agents/ become worldflux.envs and worldflux.agents only when installed, so types are checked there.
type: $(READY)
	@rm -rf build/typed build/lib
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typed .
	@cd build/typed && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p worldflux

# The API pages show the package as it is installed, too. Its tools are no part of what the tests need.
# The banner that it silences announces the end of mkdocs-material in 2027; its successor reads mkdocs.yml as well.
docs: $(READY)
	@rm -rf build/documented build/lib
	@$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[docs]"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/documented .
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "The documentation is build/site/index.html."

clean:
	rm -rf $(VENV) build dist demo offline worldflux.egg-info

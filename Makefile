# `make demo` trains the demo model on this machine and lets it speak; `make test` runs everything that is checked.
# `make install` only installs, for the model in models/evening.
# `make sanitize` runs the compiled steps under sanitizers for longer, `make test-lowest` the suite with the lowest versions
# of the packages that we depend on. `make site` writes the documentation as a web site.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo install test test-lowest sanitize lint site clean

demo: $(VENV)/installed
	$(BIN)/moonwhale train --preset demo --out runs/demo --resume
	$(BIN)/moonwhale generate runs/demo --chat --temperature 0.5 --seed 3 "Hi! How are you doing today?" "What do you like to do for fun?"

install: $(VENV)/installed

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

sanitize: $(VENV)/installed-dev
	$(BIN)/python tests/native/fuzz.py 300

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(LOWEST) runs site .pytest_cache .ruff_cache .mypy_cache build src/*.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moonwhale needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	$(PIP) install -c constraints.txt -e ".[rl,gguf,tokenizers]" || \
		echo "make goes on without the extras rl, gguf and tokenizers: a C compiler and Python's headers may be missing"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -c constraints-lowest.txt -e ".[dev,fp8]"
	@touch $@

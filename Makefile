# make test: make the environment and pass the tests. Needs Python 3.11+ and nothing else.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: env test check clean
env: .venv/.done

.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[test]'
	touch $@

test: env
	$(BIN)/python -m pytest

check: env
	$(BIN)/ruff check lib tests

clean:
	rm -rf .venv outputs/*/

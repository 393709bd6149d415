# make demo: set up, draw a city, map it, say how good the result is.    make test: set up, run all tests.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo-city

.PHONY: demo test check format bench clean

demo: .venv/installed
	$(BIN)/segpipe demo $(DEMO) --run

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What CI asks besides the tests: style, types, and which way the imports run.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/mypy/segpipe
	for folder in pipeline tasks models; do ln -sfn ../../../$$folder build/mypy/segpipe/$$folder; done
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo-city

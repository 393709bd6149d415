# make demo: set up, draw a city, map it, say how good the result is.    make test: set up, run all tests.
# make bench: the short form of what measures speed and memory of a run and a training, with the imagery in SHARED.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo-city
SHARED ?= ../shared
BANEPA = {images: $(abspath $(SHARED))/data/$(1)/banepa_image.tif, labels: $(abspath $(SHARED))/data/$(1)/banepa_mask.tif}

.PHONY: demo test check format bench clean

demo: .venv/installed
	$(BIN)/segpipe demo $(DEMO) --run

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile

# What CI asks besides the tests: style, types, and which way the imports run.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/mypy/segpipe
	for folder in pipeline tasks models; do ln -sfn ../../../$$folder build/mypy/segpipe/$$folder; done
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python bench/forward.py --side 512 --rounds 3
	$(BIN)/python bench/read.py --short
	$(BIN)/python bench/vectorize.py --short
	$(BIN)/python bench/scale.py --short
	$(BIN)/python bench/gpu.py --tiles 2 --side 700 --network unet-mobilenetv2
	$(BIN)/python bench/run.py $(SHARED)/data/banepa/tiles --repeat 1
	$(BIN)/python bench/run.py $(SHARED)/data/banepa/tiles --repeat 1 --tiles 2
	$(BIN)/python bench/naive.py $(SHARED)/data/banepa/tiles --labelled $(SHARED)/data/val
	$(BIN)/python bench/train.py conf/train/buildings.yaml --steps 5 --set network.initialisation=lecun \
	  --set 'areas=[$(call BANEPA,train)]' --set 'validate=[$(call BANEPA,val)]'

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pip would compile all modules one after the other, which takes longer than to unpack them; some are for another Python.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo-city

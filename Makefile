# make demo | test | bench | lint | format      one environment for all of them, made when needed, in .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
SECONDS_EACH ?= 6
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test bench lint format clean

demo: $(READY)  ## train dense, random and gate at 10% on the embedded digits, and draw the report
	$(BIN)/sparse-train compare --data digits --rate 0.1 --seconds $(SECONDS_EACH) --seeds 3 --out $(OUT)

test: $(READY)  ## the whole suite
	$(BIN)/pytest

bench: $(READY)  ## speed, as ratios; wants an idle machine
	$(BIN)/pytest benchmarks --benchmark-only --record

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/cuda_on_cpu/*.h)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(wildcard tests/cuda_on_cpu/*.h)

clean:
	rm -rf $(VENV) build *.egg-info sparse_kernels/_build_info.py sparse_kernels/*.so

# Editable, so that what is run is what is edited; built again where the C++ or the packaging changed.
$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt -e '.[test,lint]'
	touch $@

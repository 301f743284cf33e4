# make demo | test | bench | lint | format      each makes what it needs, in .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp')
PACKAGE := pyproject.toml setup.py constraints.txt $(SOURCES)

.PHONY: demo test bench bench-compare lint format clean

demo: $(VENV)/.demo  ## train dense, random and gate at 10% on the embedded digits, and draw the report
	$(BIN)/sparse-train compare --data digits --rate 0.1 --seconds $(or $(SECONDS_EACH),6) --seeds 3 \
		--out $(or $(OUT),runs/demo-$(shell date +%Y%m%d-%H%M%S))

test: $(VENV)/.dev  ## the whole suite
	$(BIN)/pytest

bench: $(VENV)/.dev  ## speed, as ratios; wants an idle machine
	$(BIN)/pytest benchmarks --benchmark-only

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build *.egg-info sparse_kernels/_build_info.py sparse_kernels/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# As a user installs it: a wheel, built in isolation.
$(VENV)/.demo: $(BIN)/python $(PACKAGE) $(shell find sparse_kernels python_api -name '*.py' -o -name '*.j2')
	$(PIP) install -c constraints.txt '.[train]'
	rm -f $(VENV)/.dev && touch $@

# Editable, so that what is tested is what is edited.
$(VENV)/.dev: $(BIN)/python $(PACKAGE)
	$(PIP) install -c constraints.txt -e '.[test,lint]'
	rm -f $(VENV)/.demo && touch $@

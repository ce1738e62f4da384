# Every target makes what it needs, from a fresh checkout on, and nothing twice.
#
#   make reproduce   environment, build, the main experiments (preset cpu), report page
#   make test        environment, build, native tests (ctest), then pytest
#   make lint        ruff, mypy, clang-format
#   make bench       measurements beside plain PyTorch, one JSON line each, into results/bench
#   make bench-docs  the same for this repository: lines, plots and tables of docs/results/cpu, docs/kernels.md, README.md
#   make docs        the documentation as a site, into build/docs; broken links are errors (Python 3.11 or newer)
#   make soak        the long versions of the tests
#   make gpu-pass    on a machine with a GPU: build, GPU tests, benchmarks, into $OUT
#   make stub        catapult_ext/_C.pyi, after a change of the bindings
#   make clean       removes the environment and everything built; runs and results stay
#
# Variables: PYTHON (3.10 or newer; makes .venv), CATAPULT_CUDA (AUTO | ON | OFF), CATAPULT_DATA (image sets),
# WORKERS (pytest processes), ARGS (further arguments for pytest, `catapult reproduce` or `catapult bench`).

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/make

NATIVE_SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt catapult_ext/_version.py
CPP_SOURCES := $(filter %.h %.cpp %.inc %.cu %.cuh,$(NATIVE_SOURCES))

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: reproduce test lint bench bench-docs docs soak gpu-pass stub clean
.DELETE_ON_ERROR:

reproduce: $(VENV)/.built
	$(BIN)/catapult reproduce $(ARGS)

test: $(VENV)/.built
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=error
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

soak: $(VENV)/.built
	$(BIN)/pytest -m slow $(ARGS)

bench: $(VENV)/.built
	$(BIN)/catapult bench --out results/bench $(ARGS)

bench-docs: $(VENV)/.built
	$(BIN)/catapult bench gram-128 gram-2000 chain- --simd avx2 --simd scalar --out docs/results/cpu --seconds 1 --no-memory
	$(BIN)/catapult bench --out docs/results/cpu --seconds 3 --plots --tables $(ARGS)

docs: $(VENV)/.built
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: the documentation is built with Python 3.11 or newer; set PYTHON and run make clean"; exit 1; }
	$(BIN)/sphinx-build -b html -q -W --keep-going docs build/docs
	@echo "open build/docs/index.html"

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

stub: $(VENV)/.built
	$(BIN)/python tests/stub_writer.py
	$(BIN)/ruff format -q catapult_ext/_C.pyi

gpu-pass:
	bash .ci/gpu_pass

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find catapult_ext python_experiments tests -name __pycache__ -type d -exec rm -rf {} +

# The environment: what builds the extension, then (with the build) everything that it needs at run time,
# for the tests and for lint. Every version is the one in constraints.txt.
$(VENV)/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is not Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null \
	  || { echo "error: no C++ compiler ($${CXX:-c++}); install g++ or set CXX"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip scikit-build-core pybind11 ninja cmake
	touch $@

$(VENV)/.built: $(VENV)/.tools pyproject.toml $(NATIVE_SOURCES)
	SKBUILD_BUILD_DIR=$(BUILD) SKBUILD_CMAKE_DEFINE=CATAPULT_NATIVE_TESTS=ON \
	  $(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[test,dev,docs]'
	touch $@

# On a fresh machine with Python 3.11+ and a C++ compiler one command does everything: each target depends on `install`.
#
#   make demo     trains eight losses on scanned digits and writes demo/index.html
#   make test     the tests                 make bench    every benchmark, few rounds
#   make lint     ruff, mypy, clang-format  make cpptest  the C++ library and its tests
#   make docs     the site, build/site/index.html
#   make test-triton  the Triton kernels without a GPU: interpreted by the op tests, compiled for sm_90
#   make test-all     test, test-triton, cpptest
#   make nightly      what a change rarely breaks: cpptest under ASan and UBSan, 2,000 drawn networks, a toy op compiled, growth,
#                     every cell of the table of several processes, runs killed at every write, device code for sm_80 too,
#                     the PTX of every kernel in every type
#   make release      source archive and wheel in dist/, each installed in an empty environment and tried
#
# PYTHON  the interpreter for .venv          TORCH  what to install as torch, e.g. TORCH="torch==2.12.*"
# JOBS    processes for the tests, as many as there are cores
PYTHON ?= python3
TORCH ?= torch==2.13.*
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install demo docs test test-fuzz test-triton test-all nightly bench lint format cpptest release clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/*.* csrc/*/*.* python/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[experiments,test,docs,dev]"
	$(BIN)/python -m margin_kernels.info
	touch $(STAMP)

demo: install
	$(BIN)/margin-kernels demo --out demo $(DEMO)

# Strict: a link to nothing, a page outside the navigation and a name that is not documented are errors.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html: open it, or for the search: $(BIN)/python -m http.server --directory build/site"

# A process for each core, with one thread each.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(TESTS)

# Drawn networks, twenty times as many as `make test` draws, and other ones each time.
test-fuzz: install
	MARGIN_KERNELS_FUZZ=2000 $(BIN)/python -m pytest -q tests/gradients/test_drawn.py tests/experiments/test_readers.py

# The op tests on the Triton kernels, run by Triton's interpreter, and the same kernels compiled for sm_90: no GPU needed.
# `python -m margin_kernels.triton.compile_check` prints the registers that they take.
OP_TESTS := $(patsubst margin_kernels/reference/%.py,tests/ops/test_%.py,$(filter-out %/__init__.py,$(wildcard margin_kernels/reference/*.py)))
test-triton: install
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile --backend triton $(OP_TESTS) tests/ops/test_dispatch.py tests/ops/test_triton.py

test-all: test test-triton cpptest

nightly: test-fuzz
	MARGIN_KERNELS_NIGHTLY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/house/test_contributing.py tests/task/test_growth.py tests/distributed tests/experiments/test_failures.py \
	    tests/experiments/test_torchrun.py tests/ptx
	$(MAKE) cpptest SANITIZE=ON
	if command -v nvcc >/dev/null; then $(MAKE) cpptest CUDA_CHECK=ON; fi

bench: install
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-only --benchmark-min-rounds=1 --benchmark-max-time=0.01 \
	    --benchmark-warmup=off --benchmark-columns=median,ops,rounds --benchmark-sort=name -q
	$(BIN)/python benchmarks/kernels.py --quick --out build/bench/kernels.json
	$(BIN)/python benchmarks/step.py --quick --threads 1 --out build/bench/step.json
	$(BIN)/python benchmarks/monitor.py --quick --networks mnist_cnn --threads 1 --out build/bench/monitor.json
	$(BIN)/python benchmarks/losses.py --quick --networks mlp800 --threads 1 --out build/bench/losses.json
	$(BIN)/python benchmarks/kernels_gpu.py --device cpu --quick --out build/bench/kernels_gpu.json

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# CUDA_CHECK=ON also compiles the device code with nvcc, without a GPU; SANITIZE=ON uses AddressSanitizer and UBSan, in a
# folder of its own.
CPPTEST := build/$(if $(filter ON,$(SANITIZE)),sanitize,cmake)
cpptest: install
	cmake -S . -B $(CPPTEST) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -DMARGIN_KERNELS_CUDA_CHECK=$(or $(CUDA_CHECK),OFF) -DMARGIN_KERNELS_SANITIZE=$(or $(SANITIZE),OFF) \
	    -DMARGIN_KERNELS_CUDA_CHECK_ARCHITECTURES="$(or $(CUDA_ARCHITECTURES),80;90)"
	cmake --build $(CPPTEST)
	ctest --test-dir $(CPPTEST) --output-on-failure --parallel $(JOBS)

release: install
	TORCH="$(TORCH)" bash .ci/release

clean:
	rm -rf build dist .coverage* *.egg-info margin_kernels/_C*.so margin_kernels/_build.py

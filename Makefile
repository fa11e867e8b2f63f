# Every job in one or two visible commands. An active environment that already has torch is reused; else .venv is made.
TORCH := torch==2.13.0
PYTHON := $(shell python3 -c "import importlib.util as u, sys; \
  print(sys.executable if u.find_spec('torch') else '.venv/bin/python')")
# One set of stamps per environment: another one, or one that was removed, is built anew.
STAMPS := build/stamps/$(subst /,-,$(PYTHON))
SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-name kns=kegfast
BENCH_SECONDS := 200
KEGFAST_FUZZ_SECONDS ?= 3600
OPTIMIZE ?= -O3
COMPILERS ?=
NATIVE := setup.py CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)

.PHONY: missing venv build demo test compilers fuzz sanitize device-check test-cuda sanitize-cuda bench bench-diversity bench-tucker2 bench-cuda fmt lint docs clean
.DEFAULT_GOAL := build

venv: $(STAMPS)/venv
build: $(STAMPS)/build

$(STAMPS)/venv: pyproject.toml $(if $(wildcard $(PYTHON)),,missing)
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -c "import torch" 2>/dev/null || $(PYTHON) -m pip install $(TORCH)
	$(PYTHON) -m pip install "cmake>=3.22" ninja "pybind11>=2.13" "setuptools>=77" wheel
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/venv $(NATIVE)
	$(PYTHON) -m pip install --no-build-isolation -e ".[all]"
	touch $@

$(STAMPS)/dev: $(STAMPS)/build
	$(PYTHON) -m pip install --no-build-isolation -e ".[all,dev]"
	touch $@

$(STAMPS)/docs: $(STAMPS)/build
	$(PYTHON) -m pip install --no-build-isolation -e ".[docs]"
	touch $@

demo: build
	$(PYTHON) -m kegfast demo

test: $(STAMPS)/dev
	OMP_WAIT_POLICY=PASSIVE $(PYTHON) -m pytest -n auto

# Those of g++ 11 to 14, clang 14 to 19 and the cross compiler for aarch64 that are there, or those of COMPILERS;
# OPTIMIZE=-O0 is quick.
compilers: $(STAMPS)/venv
	bash tests/compilers.sh $(PYTHON) $(OPTIMIZE) $(COMPILERS)

fuzz: $(STAMPS)/dev
	KEGFAST_FUZZ_SECONDS=$(KEGFAST_FUZZ_SECONDS) OMP_WAIT_POLICY=PASSIVE $(PYTHON) -m pytest tests/fuzz

# For a bare machine that has a device: no network, nothing installed. What it finds is left in OUT.
OUT := build/device
device-check:
	$(PYTHON) tests/cuda/device_check.py --out $(OUT)

# The CPU kernels on every instruction set of this machine: addresses and undefined behavior, then races of two threads;
# then the whole native part under torch, addresses and undefined behavior again.
SANITIZED := tests/ops/test_tucker2*.py tests/ops/test_diversity*.py
sanitize: $(STAMPS)/dev
	set -e; export PATH="$(dir $(abspath $(PYTHON))):$$PATH"; for kind in Sanitize Races; do \
	  cmake -S . -B build/$$kind -G Ninja -DCMAKE_BUILD_TYPE=$$kind -DPython_EXECUTABLE="$(abspath $(PYTHON))" \
	    -DFORCE_CUDA=0; \
	  cmake --build build/$$kind --target kegfast_kernels; build/$$kind/kegfast_kernels; done; \
	cmake --build build/Sanitize --target _C; \
	bash tests/sanitized.sh build/Sanitize $(SANITIZED)

test-cuda: $(STAMPS)/dev
	$(PYTHON) -m pytest tests/cuda/test_cuda.py

sanitize-cuda: $(STAMPS)/dev
	for tool in memcheck synccheck racecheck; do \
	  $(SANITIZER) --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -x tests/cuda/test_cuda.py -k sanitized || exit 1; done

bench: bench-diversity bench-tucker2

bench-diversity: $(STAMPS)/dev
	$(PYTHON) -m benchmarks.bench_diversity

bench-tucker2: $(STAMPS)/dev
	$(PYTHON) -m benchmarks.bench_tucker2
	$(PYTHON) -m benchmarks.bench_tucker2 --threads 2 --batches 8 64
	$(PYTHON) -m benchmarks.bench_tucker2 --dtype bfloat16
	$(PYTHON) -m benchmarks.bench_tucker2 --training --batches 8 64

bench-cuda: $(STAMPS)/dev
	$(PYTHON) -m benchmarks.bench_cuda --seconds $(BENCH_SECONDS)

fmt: $(STAMPS)/dev
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .
	git ls-files csrc tests | grep -E '\.(cpp|h|inl|cu|cuh)$$' | xargs $(dir $(PYTHON))clang-format -i

lint: $(STAMPS)/dev
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	git ls-files csrc tests | grep -E '\.(cpp|h|inl|cu|cuh)$$' | xargs $(dir $(PYTHON))clang-format --dry-run -Werror

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache kegfast/*.so

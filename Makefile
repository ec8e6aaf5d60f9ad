# make test | demo | lint | sanitize | test-transformers | test-compiler | compile-ahead | build-oldest | build-macos |
#   bench | plots | build | clean
#
# Everything is installed into a virtual environment of its own, .venv. What may be set on the command line:
#   PYTHON       the Python it is made with, 3.10 or later
#   VENV         where it is, a path without spaces; an environment that has torch already keeps it
#   TORCH        which torch to install where there is none, 2.11 or later
#   TORCH_INDEX  where its CPU-only build is looked for besides the default index, if it can be reached; the default
#                index's Linux builds of torch bring gigabytes of CUDA libraries along
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
JOBS ?= 2
# Where nvcc is installed, for a short build: the GPUs that are here, or without any PTX alone, which the driver of a GPU
# would compile. A build without this variable has machine code for all GPUs.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sed 's/^90$$/90a/' | sort -u | paste -sd ';' -)
export LINCONV_CUDA_ARCHS ?= $(or $(GPUS),90-virtual)

PY := $(VENV)/bin/python
# Python compiles a module when it is first imported, as most that are installed never are, and keeps it for other processes.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
# Tests run in JOBS processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal
CONFIGURE := $(VENV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja
NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt setup.py

.PHONY: test demo lint sanitize test-transformers test-compiler compile-ahead build-oldest build-macos bench plots build clean

test: $(VENV)/.installed
	$(PYTEST) tests

demo: $(VENV)/.installed
	$(VENV)/bin/linconv demo

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Every Triton kernel, and with nvcc every CUDA one, for every GPU it is shipped for, none of which need be here; a
# register spill is an error. By the oldest Triton that will do and by that of $(VENV): what spills differs. Writes the
# tables in docs/kernels, which the tests hold against the sources.
OLDEST_TRITON := 3.6.0
compile-ahead: $(VENV)/.installed $(VENV)/triton-$(OLDEST_TRITON)
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(PY) benchmarks/compile_ahead.py
	$(PY) benchmarks/compile_ahead.py
	command -v nvcc > /dev/null && $(PY) benchmarks/compile_ahead_cuda.py || ! command -v nvcc
$(VENV)/triton-$(OLDEST_TRITON): | $(VENV)/.torch
	$(PIP) --no-deps --target $@ triton==$(OLDEST_TRITON)

# The libraries against the headers of the oldest torch, in build/oldest; with nvcc the CUDA one too. Nothing is run.
OLDEST_TORCH := 2.11.0
build-oldest: $(VENV)/.torch | $(VENV)/torch-$(OLDEST_TORCH)
	$(CONFIGURE) -B build/oldest -DTORCH_DIR=$(abspath $(VENV))/torch-$(OLDEST_TORCH)/torch "-DLINCONV_CUDA_ARCHS=$(LINCONV_CUDA_ARCHS)"
	$(VENV)/bin/cmake --build build/oldest
$(VENV)/torch-$(OLDEST_TORCH): | $(VENV)/.torch
	$(PIP) --no-deps --target $@ torch==$(OLDEST_TORCH)

# The operators' tests against the CPU library by another compiler: make test-compiler COMPILER=g++-11
COMPILER ?= clang++
test-compiler: $(VENV)/.installed
	$(CONFIGURE) -B build/$(COMPILER) -DCMAKE_CXX_COMPILER=$(COMPILER) -DLINCONV_CUDA=0 \
	  $$($(PY) -c "import torch, linconv; print(f'-DTORCH_DIR={torch.__path__[0]} -DLINCONV_VERSION={linconv.__version__}')")
	$(VENV)/bin/cmake --build build/$(COMPILER)
	LINCONV_LIBRARY_PATH="$(CURDIR)/build/$(COMPILER)" $(PYTEST) tests/ops

# The CPU library for macOS on arm64, against torch's wheel for it, by a compiler that needs no Mac. Nothing is run.
build-macos: $(VENV)/.torch | $(VENV)/torch-macos
	$(PIP) ziglang
	CXX="$(abspath $(PY)) -m ziglang c++ -target aarch64-macos.11.0" $(CONFIGURE) -B build/macos \
	  -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=arm64 -DCMAKE_OSX_SYSROOT= -DCMAKE_INSTALL_NAME_TOOL=true \
	  -DTORCH_DIR=$(abspath $(VENV))/torch-macos/torch -DLINCONV_CUDA=0
	$(VENV)/bin/cmake --build build/macos
$(VENV)/torch-macos: | $(VENV)/.torch
	$(PIP) --no-deps --only-binary=:all: --platform macosx_14_0_arm64 --python-version 3.12 --target $@ "$(TORCH)"

bench: $(VENV)/.installed
	$(PIP) -e .[bench] --no-build-isolation
	$(PY) -m pytest benchmarks

# What the repository shows of the committed results: the README's plot, the report, the fits of `linconv inspect`.
SUITES := benchmarks/results/cpu/suites
plots: $(VENV)/.installed
	$(PY) -m linconv.cli bench --plot $(SUITES)/layer.json $(SUITES)/model.json --out docs/benchmark.png
	$(PY) -m linconv.cli bench --report $(wildcard $(SUITES)/*.json) --out $(SUITES)/report
	$(PY) -m linconv.cli bench --fits $(SUITES)/layer.json --out linconv/conversion/layer_fits.json

build: $(VENV)/.installed

# The operators' tests against a library built with AddressSanitizer and UndefinedBehaviorSanitizer. libasan comes first
# in the process, and libstdc++ next to it, for it to find the throw that it wraps. Leaks are not looked for: Python never
# frees everything. The CUDA kernels, compiled for the host, likewise.
SANITIZED := LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitize: $(VENV)/.installed
	$(PY) setup.py --quiet build_native --sanitize=address,undefined
	LINCONV_LIBRARY_PATH="$(CURDIR)/build/sanitize/lib" $(SANITIZED) $(PYTEST) tests/ops
	LINCONV_HOST_SANITIZE=address,undefined $(SANITIZED) $(PYTEST) tests/csrc/test_cuda_on_host.py

# Both ends of the range of transformers: each in an environment laid over $(VENV), which lends it torch and the rest.
test-transformers: $(VENV)/.transformers-5.17.0 $(VENV)/.transformers-newest
$(VENV)/.transformers-5.17.0: REQUIREMENT = transformers==5.17.0
$(VENV)/.transformers-newest: REQUIREMENT = transformers>=5.17,<6
$(VENV)/.transformers-%: $(VENV)/.installed FORCE
	$(PY) -m venv $@
	base=$$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	over=$$($@/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	echo "import site; site.addsitedir('$$base')" > $$over/base.pth
	$@/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "$(REQUIREMENT)"
	$@/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 $@/bin/python -m pytest -n $(JOBS) tests/conversion tests/distillation
FORCE:

$(VENV)/.torch:
	$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('linconv needs Python 3.10 or later, got $(PYTHON) ' + sys.version)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	reach="import urllib.request; urllib.request.urlopen('$(TORCH_INDEX)', timeout=10); print('--extra-index-url $(TORCH_INDEX)')"; \
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $$($(PY) -c "$$reach" 2>/dev/null) "$(TORCH)"
	$(PIP) "setuptools>=77" "cmake>=3.24" ninja
	touch $@

# The build begins while pip looks for packages; the one that pip starts waits for it and finds it done.
$(VENV)/.installed: $(VENV)/.torch $(NATIVE) pyproject.toml
	$(PY) setup.py --quiet build_native --inplace & $(PIP) --no-build-isolation -e .[test]; status=$$?; wait; exit $$status
	touch $@

clean:
	rm -rf build dist linconv/lib linconv.egg-info

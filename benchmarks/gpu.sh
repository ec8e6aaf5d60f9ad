#!/usr/bin/env bash
# Everything that needs a GPU, in parts of under ten minutes each. Needs this tree, nvcc, and a Python with torch and
# triton, for tests pytest and hypothesis too, for suites transformers, scipy and tqdm; no network.
#
#   benchmarks/gpu.sh build       compiles csrc against that torch, into linconv/lib
#   benchmarks/gpu.sh triton      the Triton kernels' tests; offsets past 2^31, repeats, CUDA graphs
#   benchmarks/gpu.sh test        the operators' tests, CPU ones too
#   benchmarks/gpu.sh sanitize    compute-sanitizer: memcheck, racecheck, initcheck, on a small set; or those named after it;
#                                 OPERATORS: on all Triton tests of these operators, and the CUDA ones of padded batches
#   benchmarks/gpu.sh bench       the scan against peers, correctness first, JSON into $OUT or benchmarks/results/<gpu>/; at
#                                 widths 768 and 1024, or those named after it: each takes some 5 minutes with mamba_ssm
#   benchmarks/gpu.sh suites      the same of convolution, losses, Linformer, selective scan and layers, by `linconv bench`;
#                                 or of those named after it
#
# A part runs to its end and then fails if anything in it did. Tests are stopped in time for what has failed to be told.
# PYTHON: which Python, else python3. JOBS: processes that tests run in where pytest-xdist is installed, else one for each
# core up to 16: most of their time goes into compiling kernels. LIMIT: seconds that tests may take, else 540. BUDGET: those
# that suites may take together, else 480. DTYPES: what suites run in, else bfloat16.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" LINCONV_POISON=1

build() {
  for tool in setuptools cmake ninja; do
    "$python" -c "import $tool" 2>/dev/null || command -v "$tool" >/dev/null ||
      { echo "gpu.sh build: $tool is missing: it builds csrc. Install setuptools, cmake and ninja, or bring linconv/lib" \
             "built elsewhere for torch >= 2.11 (its ABI is stable)" >&2; exit 1; }
  done
  LINCONV_CUDA_ARCHS=${LINCONV_CUDA_ARCHS:-$("$python" -c "
import torch
major, minor = torch.cuda.get_device_capability()
print(f'{major}{minor}' + 'a' * (major == 9))")}
  export LINCONV_CUDA_ARCHS
  "$python" setup.py --quiet build_native --inplace
  "$python" -c "import linconv.environment as e; print(e.report())"
}

tests() {
  local jobs=() cores
  cores=$(nproc)
  "$python" -c "import xdist" 2>/dev/null && jobs=(-n "${JOBS:-$((cores < 16 ? cores : 16))}")
  OMP_NUM_THREADS=1 timeout --foreground --signal=INT --kill-after=30 "${LIMIT:-540}" \
    "$python" -m pytest --hypothesis-profile=gpu --tb=short --durations=10 "${jobs[@]}" "$@"
}

sanitize() {
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1 || true)
  [ -n "$sanitizer" ] || { echo "gpu.sh sanitize: compute-sanitizer is not here" >&2; exit 1; }
  [ $# -gt 0 ] || set -- memcheck racecheck initcheck
  # torch's allocator would hide what lies between two tensors, and results that start as NaN what a kernel reads before
  # anyone has written it.
  local status=0 tool
  watched() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 LINCONV_POISON=0 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --report-api-errors no "$python" -m pytest -vv --tb=short -p no:cacheprovider "$@" || status=$?
  }
  local operator
  for tool; do
    if [ -n "${OPERATORS:-}" ]; then
      for operator in $OPERATORS; do
        watched "tests/ops/triton_$operator.py"
        watched "tests/ops/test_$operator.py" -k "cuda and (padded or packed)"
      done
      continue
    fi
    watched tests/ops/triton_ssd.py
    watched tests/ops/test_bidirectional_ssd.py -k "fused and cuda"
    watched tests/ops/test_selective_scan.py -k "cuda and (padded or packed)"
  done
  return $status
}

results() {  # the folder for them
  echo "${OUT:-benchmarks/results/$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")}"
}

bench() {
  [ $# -gt 0 ] || set -- 768 1024
  local status=0 width
  for width; do
    LINCONV_POISON=0 "$python" benchmarks/bench_gpu_scan.py --widths "$width" \
      --out "$(results)/bidirectional_ssd_$width.json" || status=$?
  done
  return $status
}

suites() {
  [ $# -gt 0 ] || set -- conv loss linformer selective_scan layer
  # Each in a process of its own, whatever became of the one before, whose spare time goes to those that follow. The
  # limit of memory leaves room for what lies beside a call: inputs of all implementations.
  local status=0 folder budget dtypes=${DTYPES:-bfloat16}
  folder=$(results)/suites
  SECONDS=0
  while [ $# -gt 0 ]; do
    budget=$(((${BUDGET:-480} - SECONDS) / $#))
    LINCONV_POISON=0 "$python" -m linconv.cli bench "$1" --device cuda --dtype $dtypes --budget $((budget > 10 ? budget : 10)) \
      --longest-call 2 --memory-limit 40 --out "$folder" --overwrite || status=$?
    shift
  done
  return $status
}

case "${1:-}" in
  build) build ;;
  triton) tests tests/ops/triton_*.py ;;
  test) tests tests/ops --ignore=tests/ops/test_triton.py ;;
  sanitize) sanitize "${@:2}" ;;
  bench) bench "${@:2}" ;;
  suites) suites "${@:2}" ;;
  *) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

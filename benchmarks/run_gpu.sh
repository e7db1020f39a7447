#!/usr/bin/env bash
# Everything that needs a GPU, in one command and about ten minutes: builds in place with the system's python3 (its torch
# must have CUDA, nvcc must be there), runs the tests marked gpu, compute-sanitizer on a small grid, and the benchmarks.
#
#   bash benchmarks/run_gpu.sh [FOLDER]      FOLDER (default: build/gpu) gets logs, *.json and summary.json
#
# PYTHON   the interpreter (python3)       STAGES   a part of "build tests memcheck racecheck kernels step losses"
# A stage that fails is recorded and does not stop the others; the exit code is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-build/gpu}")
python=${PYTHON:-python3}
stages=${STAGES:-build tests memcheck racecheck kernels step losses}
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 MARGIN_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/../triton_cache}"
: "${CUDA_HOME:=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")")}"
export CUDA_HOME
worst=0
records=()

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 code=0 start=$SECONDS
  shift 2
  case " $stages " in *" $name "*) ;; *) return 0 ;; esac
  echo "== $name ($(date +%T))"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 8 "$out/$name.log"
  records+=("\"$name\": {\"exit\": $code, \"seconds\": $((SECONDS - start))}")
  [ "$code" -le "$worst" ] || worst=$code
  { printf '{'; (IFS=,; printf '%s' "${records[*]}"); printf '}\n'; } >"$out/summary.json"
  echo "== $name: exit $code after $((SECONDS - start)) s"
}

sanitizer() { # TOOL
  "$CUDA_HOME/bin/compute-sanitizer" --tool "$1" --error-exitcode 86 --kernel-regex kns=margin_kernels --print-limit 20 \
      "$python" tests/support/gpu_cases.py
}
export -f sanitizer
export python

stage build 300 "$python" setup.py build_ext --inplace
"$python" -m margin_kernels.info | tee "$out/info.log"
# The experiments' own tests need their extra; without it they cannot be collected.
ignore=()
"$python" -c 'import jsonargparse' 2>/dev/null || ignore=(--ignore=tests/experiments)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
stage tests 300 "$python" -m pytest -q -m gpu --durations=15 -p no:cacheprovider "${ignore[@]}" "${workers[@]}"
stage kernels 200 "$python" benchmarks/kernels_gpu.py --out "$out/kernels_gpu.json"
stage step 240 "$python" benchmarks/step.py --device cuda --threads 1 --out "$out/step_gpu.json" --rounds 5 \
    --networks resnet50_gn wrn28_10_gn vit_b16 resnet50_bn --dtype bfloat16 --channels-last
# It trains on scikit-learn's digits.
"$python" -c 'import sklearn' 2>/dev/null || { echo "no scikit-learn: stage losses left out"; stages=${stages/losses/}; }
stage losses 120 "$python" benchmarks/losses.py --device cuda --threads 1 --out "$out/losses_gpu.json"
stage memcheck 90 bash -c 'sanitizer memcheck'
stage racecheck 90 bash -c 'sanitizer racecheck'
cat "$out/summary.json"
exit "$worst"

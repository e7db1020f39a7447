#!/usr/bin/env bash
# Everything that needs a GPU, in two commands of less than ten minutes each: the first builds in place with the system's
# python3 (its torch must have CUDA, nvcc must be there), tests, looks for races and times the ops; the second times steps.
#
#   bash benchmarks/run_gpu.sh [FOLDER] [1|2]     FOLDER (default: build/gpu) gets logs, *.json, summary.json, results.tar
#
# PYTHON   the interpreter (python3)      STAGES   a part of what a command does
# DEVICE   cuda; with cpu a dry run: the same stages in small, without the CUDA kernels
# A stage has a limit of its own; the limits of a command add up to less than 560 s. A stage that fails or is stopped is
# recorded and does not stop the others; the exit code is that of the worst. `python benchmarks/tables.py --read
# results.tar` prints the tables.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-build/gpu}")
part=${2:-1}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
all=([1]="build cuda triton memcheck racecheck kernels" [2]="build step losses compiled")
stages=${STAGES:-${all[$part]:?the second argument must be 1 or 2}}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/../triton_cache}" python
# ninja may be installed beside python and not be on PATH.
PATH="$(dirname "$(command -v "$python")"):$("$python" -c 'import ninja; print(ninja.BIN_DIR)' 2>/dev/null):$PATH"
worst=0
records=()
echo "{}" >"$out/summary_$part.json"

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 code=0 start=$SECONDS
  shift 2
  case " $stages " in *" $name "*) ;; *) return 0 ;; esac
  echo "== $name ($(date +%T))"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 8 "$out/$name.log"
  records+=("\"$name\": {\"exit\": $code, \"seconds\": $((SECONDS - start))}")
  [ "$code" -le "$worst" ] || worst=$code
  { printf '{'; (IFS=,; printf '%s' "${records[*]}"); printf '}\n'; } >"$out/summary_$part.json"
  echo "== $name: exit $code after $((SECONDS - start)) s"
}

sanitizer() { # TOOL: compute-sanitizer, where this machine lets it at the device
  local tool
  tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if ! timeout 25 "$tool" --tool "$1" "$python" -c 'import torch; torch.ones(1, device="cuda").sum().item()'; then
    echo "REFUSED: compute-sanitizer --tool $1 does not run here; nothing was looked at"
    return 0
  fi
  "$tool" --tool "$1" --error-exitcode 86 --kernel-regex kns=margin_kernels --print-limit 20 "$python" tests/support/gpu_cases.py
}
export -f sanitizer

# What a test file needs and this machine lacks leaves that file out, with a word.
tests=(tests/gpu)
if "$python" -c 'import hypothesis' 2>/dev/null; then tests+=(tests/ops); else echo "no hypothesis: tests/ops left out"; fi
pytest=("$python" -m pytest -q --durations=10 -p no:cacheprovider)
"$python" -c 'import xdist' 2>/dev/null && pytest+=(-n $(($(nproc) < 8 ? $(nproc) : 8)))
if [ "$device" = cuda ]; then
  export MARGIN_KERNELS_CUDA=1
  marked=(-m gpu) quick=() triton=triton compiled=cuda
else
  export MARGIN_KERNELS_CUDA=0
  marked=(-m "not gpu") quick=(--quick) triton=reference compiled=cpu
fi

stage build 190 "$python" setup.py build_ext --inplace
"$python" -m margin_kernels.info | tee "$out/info.log"
# Every sixth test of the ops: the grids are made for minutes on a CPU.
stage cuda 80 "${pytest[@]}" "${marked[@]}" --backend "$compiled" --every 6 "${tests[@]}"
stage triton 80 "${pytest[@]}" "${marked[@]}" --backend "$triton" --every 24 "${tests[@]}"
stage memcheck 60 bash -c 'sanitizer memcheck'
stage racecheck 60 bash -c 'sanitizer racecheck'
stage kernels 80 "$python" benchmarks/kernels_gpu.py --device "$device" "${quick[@]}" --out "$out/kernels_gpu.json"
if [ "$device" = cuda ]; then
  step=(--networks resnet50_gn wrn28_10_gn vit_b16 resnet50_bn --dtype bfloat16 --channels-last --rounds 5)
else
  step=(--networks lenet5)
fi
stage step 180 "$python" benchmarks/step.py --device "$device" --threads 1 "${quick[@]}" "${step[@]}" --out "$out/step_gpu.json"
stage losses 90 "$python" benchmarks/losses.py --device "$device" --threads 1 "${quick[@]}" --networks mlp800 lenet --out "$out/losses_gpu.json"
stage compiled 90 "$python" benchmarks/kernels_gpu.py --device "$device" "${quick[@]}" --compiled --only competitors \
    --out "$out/kernels_gpu_compiled.json"
cat "$out/summary_$part.json"
(cd "$out" && tar -cf results.tar -- *.json *.log)
exit "$worst"

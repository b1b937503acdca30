#!/usr/bin/env bash
# Everything a GPU machine should do, in one command of under ten minutes without network: build for its architecture,
# prove the kernels on it, measure them. Writes DATE-GPU.json and DATE-GPU.md into DIR (default bench/results) and logs
# into a temporary folder that it names. Exit 2: no GPU here. Exit 1: something failed; the rest was still run.
#
#     bench/gpu.sh [DIR]
#
# Needs nvcc, cmake, ninja, pybind11, torch with CUDA, pytest, pytest-benchmark; compute-sanitizer where there is one.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(mkdir -p "${1:-$root/bench/results}" && cd "${1:-$root/bench/results}" && pwd)
cd "$root"
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: no GPU: this torch sees no CUDA device" >&2
  exit 2
fi
logs=$(mktemp -d)
echo "logs in $logs"
export PYTHONPATH=$root:$root/python PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
failed=""
begun=$SECONDS

step() {  # step NAME SECONDS COMMAND...: runs it under a limit, keeps its log, remembers a failure, goes on
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
  echo "$name: exit $status after $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || { failed+=" $name"; tail -n "${TAIL:-25}" "$logs/$name.log"; }
  return 0
}

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
archs=$capability
[ "$capability" -ne 90 ] || archs="90a;90"
export ECHO_EXT_CUDA=ON ECHO_EXT_CUDA_ARCHS=$archs
step build 240 "$python" setup.py build_ext --inplace
step info 60 "$python" -c 'import echo_ext, json; print(json.dumps(echo_ext.build_info(), default=str, indent=1))'
cat "$logs/info.log"

# The marked tests only: other modules need packages that such a machine may lack.
mapfile -t marked < <(grep -rlE '\bgpu\b' tests --include='test_*.py' | sort)
step tests 300 "$python" -m pytest -q -m gpu --import-mode=importlib -p no:cacheprovider "${marked[@]}"
tail -n 3 "$logs/tests.log"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
      "$python" -m pytest -q -m gpu -k "sanitizer" --import-mode=importlib -p no:cacheprovider "${marked[@]}"
  done
else
  echo "compute-sanitizer: not installed"
fi

step ceilings 60 "$python" bench/ceilings.py --json "$logs/ceilings.json"
cat "$logs/ceilings.log"
step ops 150 "$python" -m pytest -q bench --ignore bench/bench_block.py --import-mode=importlib -p no:cacheprovider \
  --benchmark-json "$logs/ops.json" --benchmark-columns=median,min,max --benchmark-sort=name
step block 120 "$python" -m pytest -q bench/bench_block.py -k "wan2" --import-mode=importlib -p no:cacheprovider \
  --benchmark-json "$logs/block.json" --benchmark-columns=median,min,max
step baseline 150 "$python" bench/baseline.py --device cuda --geometry official --dtype bf16 --switch off all \
  --blocks 5 --out "$logs/baseline.json"
tail -n 12 "$logs/baseline.log"

step end-to-end 150 "$python" bench/end_to_end.py --device cuda --out "$logs/end_to_end.json"
step memory 60 "$python" bench/full_geometry.py --device cuda
cat "$logs/end-to-end.log" "$logs/memory.log"

"$python" bench/report.py --logs "$logs" --out "$out" --failed "${failed# }" || failed+=" report"
echo "$((SECONDS - begun)) s in all; failed:${failed:- nothing}"
[ -z "$failed" ]

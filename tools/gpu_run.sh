#!/usr/bin/env bash
# Everything that a GPU should be asked first, in two calls of under ten minutes each: `tools/gpu_run.sh 1`, then `2`.
#
# Each part has a time limit of its own and keeps its log in $OUT (gpu-results without it); a part that fails keeps the
# others. A fresh machine has nothing built, so either call builds where that is missing. No network is needed.
# tools/gpu.md says what to expect and what to do about what. With --without-device everything is rehearsed: compiled for
# sm_90, launched nowhere.
set -u
cd "$(dirname "$0")/.."
call=${1:?"tools/gpu_run.sh 1|2 [--without-device]"} rehearse=${2:-}
OUT=${OUT:-gpu-results}; mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
begin=$SECONDS

part() { # name, seconds, command
  local name=$1 limit=$2 start=$SECONDS; shift 2
  echo "== $name: at most $limit s"
  timeout -k 10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  local rc=$?
  grep -v '^ *$' "$OUT/$name.log" | tail -n "${LINES_SHOWN:-8}"
  local said="exit $rc"; [ $rc = 124 ] && said="out of time"
  echo "$name: $said, $((SECONDS - start)) s" | tee -a "$OUT/summary"
  return $rc
}

tests() { # arguments of pytest
  if [ -n "$rehearse" ]; then # no GPU: that the tests are found and chosen, which importing them takes
    "$PYTHON" -c 'import sys, torch, pytest
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_capability = lambda *device: (9, 0)
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:xdist", *[a for a in sys.argv[1:] if a not in ("-n", "12")]]))' "$@"
  else
    "$PYTHON" -m pytest -q "$@"
  fi
}
export -f tests; export PYTHON rehearse

# What needs the device for itself: memory of gigabytes, time, or a mode of the whole process.
alone="2_31 or 32_bits or offload or never_waits or graph or memory"
echo "call $call of $(git rev-parse --short HEAD 2> /dev/null), $(date -u +%FT%TZ)" | tee -a "$OUT/summary"
nvidia-smi 2> /dev/null | head -15 | tee "$OUT/nvidia-smi.log"
if [ ! -e bigkernels/libbigkernels_cpu.so ]; then
  part build 200 env BIGKERNELS_NATIVE=0 MAX_JOBS="$(nproc)" "$PYTHON" setup.py -q build_ext --inplace ||
    part build-without-cuda 100 env BIGKERNELS_CUDA=0 BIGKERNELS_NATIVE=0 MAX_JOBS="$(nproc)" "$PYTHON" setup.py -q build_ext --inplace
fi

case $call in
  1)
    LINES_SHOWN=60 part info 40 "$PYTHON" -m bigkernels info
    part first 150 "$PYTHON" tools/gpu_first.py --seconds 130 $rehearse
    left=$((570 - (SECONDS - begin)))
    part tests $((left > 330 ? 330 : left)) bash -c 'tests "$@"' - --maxfail=60 -n 12 tests/gpu -k "not ($alone) and not opcheck"
    ;;
  2)
    part tests-alone 170 bash -c 'tests "$@"' - tests/gpu -k "$alone"
    if command -v compute-sanitizer > /dev/null; then
      part memcheck 80 compute-sanitizer --tool memcheck "$PYTHON" tools/gpu_first.py --dtypes bfloat16 --seconds 60 $rehearse
    else
      echo "memcheck: there is no compute-sanitizer here" | tee -a "$OUT/summary"
    fi
    left=$((575 - (SECONDS - begin)))
    LINES_SHOWN=400 part probe $((left > 300 ? 300 : left)) "$PYTHON" tools/gpu_probe.py --seconds 220 --json "$OUT/probe.json" $rehearse
    ;;
  *) echo "calls are 1 and 2"; exit 2 ;;
esac
echo "call $call took $((SECONDS - begin)) s"; cat "$OUT/summary"

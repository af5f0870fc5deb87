#!/usr/bin/env bash
# On a machine with a CUDA GPU, runs everything that cannot be measured elsewhere, in at most ten minutes and without a
# network: the tests that need CUDA, a comparison of all forms of a step, the speed of every step in bfloat16 and float32
# with and without CUDA graphs, the division of an agent's time, and short learning curves of both algorithms on two
# tasks. Each part has its own time limit. A part that fails or is cut short does not affect the others and keeps what it
# has measured so far.
#
#     bash benchmarks/gpu.sh OUT          # PYTHON=... for another interpreter, SECONDS_IN_ALL=... for another time limit
#
# Requires worldflux with dm_control and pytest. Writes OUT/summary.txt, OUT/speed.md and the files behind them. The exit
# code is 1 if a part failed; a part that only ran out of time did not fail.
set -uo pipefail
where=${1:-${OUT:?usage: bash benchmarks/gpu.sh OUT}}
out=$(mkdir -p "$where" && cd "$where" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
all=${SECONDS_IN_ALL:-585}
export MUJOCO_GL=${MUJOCO_GL:-egl} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
: > "$out/summary.txt"

# note NAME CODE SECONDS: appends a line to the summary.
note() {
    local verdict="failed with exit code $2, see $1.log"
    case $2 in
        0) verdict="done" ;;
        124 | 137 | 143) verdict="cut short" ;;
    esac
    echo "$1: $verdict, $3 s" | tee -a "$out/summary.txt"
}

# part NAME MOST COMMAND...: runs a command for at most MOST seconds, within the remaining time.
part() {
    local name=$1 most=$2 started=$SECONDS left=$((all - SECONDS))
    shift 2
    if ((left < 10)); then
        echo "$name: skipped, no time left" | tee -a "$out/summary.txt"
        return
    fi
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" > "$out/$name.log" 2>&1
    note "$name" $? $((SECONDS - started))
}

# curve FAMILY PRESET TASK MOST [OPTIONS...]: a short run with one seed, of at most 40,000 steps.
curve() {
    part "curve-$1-$3" "$4" "$python" benchmarks/dmc.py --model "$2" --tasks "$3" --seeds 0 --steps 40000 --accept 0 \
        --device cuda --dtype bfloat16 --out "$out/curves-$1-$3" "${@:5}"
}

speed() {  # NAME MOST OPTIONS...
    part "speed-$1" "$2" "$python" benchmarks/throughput.py --device cuda --budget 3 --out "$out/speed-$1.json" "${@:3}"
}

"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" > "$out/device.txt" 2>&1 ||
    { cat "$out/device.txt" >&2; echo "There is no CUDA device." >&2; exit 2; }
part tests 90 "$python" -m pytest -q -p no:cacheprovider tests/accel/test_cuda.py
part doctor 60 "$python" -m worldflux.cli.main doctor --check-device cuda
speed bfloat16 140 --dtype bfloat16
speed float32 100 --dtype float32
speed plain 70 --dtype bfloat16 float32 --compile off
part online 40 "$python" benchmarks/shares.py dmc/walker-walk --device cuda --steps 300 \
    --preset tdmpc2:reference-5m dreamerv3:reference-1m
part table 30 "$python" benchmarks/table.py "$out"/speed-*.json --out "$out/speed.md"
left=$((all - SECONDS))  # the curves share the device, so nothing else is timed meanwhile
for task in walker-walk cartpole-swingup; do
    curve tdmpc2 tdmpc2:reference-5m "$task" "$left" --eval-every 5000 --eval-episodes 3 &
    curve dreamerv3 dreamerv3:reference-1m "$task" "$left" &  # its scores are those of training episodes
done
wait
! grep "failed" "$out/summary.txt"

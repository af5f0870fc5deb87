#!/usr/bin/env bash
# Measures on a machine with a CUDA GPU, in at most ten minutes and without a network, what no other machine can tell:
# the tests that need CUDA, whether all forms of a step compute the same, the speed of every step in bfloat16 and
# float32, recorded and plain, where the time of learning goes, and short learning curves of both families on two tasks.
# Every part has a time of its own: one that fails or is cut short leaves the others alone, and what it had measured
# until then.
#
#     bash benchmarks/gpu.sh OUT          # PYTHON=... for another interpreter, SECONDS_IN_ALL=... for another time
#
# Needs worldflux with dm_control and pytest installed. Writes OUT/summary.txt, OUT/speed.md and what they come from.
# The exit code is 1 if a part failed; a part that only ran out of time did not.
set -uo pipefail
where=${1:-${OUT:?usage: bash benchmarks/gpu.sh OUT}}
out=$(mkdir -p "$where" && cd "$where" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
all=${SECONDS_IN_ALL:-585}
export MUJOCO_GL=${MUJOCO_GL:-egl} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
: > "$out/summary.txt"

# note NAME CODE SECONDS: a line of the summary.
note() {
    local verdict="failed with exit code $2, see $1.log"
    case $2 in
        0) verdict="done" ;;
        124 | 137 | 143) verdict="cut short" ;;
    esac
    echo "$1: $verdict, $3 s" | tee -a "$out/summary.txt"
}

# part NAME MOST COMMAND...: runs for at most MOST seconds, and never longer than there is time.
part() {
    local name=$1 most=$2 started=$SECONDS left=$((all - SECONDS))
    shift 2
    if ((left < 10)); then
        echo "$name: left out, no time" | tee -a "$out/summary.txt"
        return
    fi
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" > "$out/$name.log" 2>&1
    note "$name" $? $((SECONDS - started))
}

# curve FAMILY PRESET TASK MOST [OPTIONS...]: a short run of one seed, of 40,000 steps if there is time for them.
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
left=$((all - SECONDS))  # the curves share the device, so nothing is timed beside them
for task in walker-walk cartpole-swingup; do
    curve tdmpc2 tdmpc2:reference-5m "$task" "$left" --eval-every 5000 --eval-episodes 3 &
    curve dreamerv3 dreamerv3:reference-1m "$task" "$left" &  # its scores are those of training episodes
done
wait
! grep "failed" "$out/summary.txt"

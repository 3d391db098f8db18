#!/usr/bin/env bash
# Everything that wants a GPU, in one go: does it run, what does it cost, where does the rest go.
#
#   benchmarks/gpu.sh [--minutes 9] [--commit HASH] [--dry-run] FOLDER [STAGE ...]
#
# Needs a python3 (or .venv here) with vLLM's CUDA build; the project is installed beside it where it is missing. Writes
# a JSON file for each stage, log.txt and summary.txt into FOLDER. Every stage has its share of the minutes, and what one
# leaves goes to the others; one that fails or runs out of time does not stop them, and `steer-vllm bench` keeps the
# loads it has measured. Stages that are named share the minutes among themselves. --commit: what the results say where
# there is no git checkout. --dry-run: every stage on a CPU at the smallest sizes.
set -uo pipefail

STAGES=(smoke decode kernels ops lora tests)                 # the most valuable first
MORE=(curve step training loading prefix serving)            # by name only
declare -A WEIGHT=([smoke]=6 [decode]=30 [kernels]=6 [ops]=4 [lora]=20 [tests]=6 [curve]=30 [step]=5 [training]=6 [loading]=10 [prefix]=10 [serving]=30)
MARGIN=20                                                    # seconds in which an engine ends and results are written

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    echo "Stages: ${STAGES[*]}; by name only: ${MORE[*]}."
    exit "$1"
}

minutes=9 commit="" dry=""
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=$2; shift ;;
        --commit) commit=$2; shift ;;
        --dry-run) dry=yes ;;
        --help | -h) usage 0 ;;
        -*) echo "gpu.sh: unknown option $1" >&2; usage 2 >&2 ;;
        *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || usage 2 >&2
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
chosen=("${STAGES[@]}")
[ $# -gt 0 ] && chosen=("$@")
total=0
for stage in "${chosen[@]}"; do
    [ -n "${WEIGHT[$stage]:-}" ] || { echo "gpu.sh: unknown stage $stage" >&2; usage 2 >&2; }
    total=$((total + WEIGHT[$stage]))
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=$(command -v python3)
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 PYTHONUNBUFFERED=1 TMPDIR=$scratch
cd "$scratch" || exit 2
if ! "$python" -c 'import steer_vllm.training' 2>/dev/null; then
    mkdir source && cp -r "$root"/{pyproject.toml,setup.py,README.md,LICENSE,steer_vllm,training,server} source || exit 2
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$scratch/site" ./source || exit 2
    export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
fi
: >"$out/log.txt"
: >"$out/summary.txt"

bench() { "${limited[@]}" "$python" -m steer_vllm.cli bench --within $((seconds - MARGIN)) "$@"; }
# The project's own settings for pytest need plugins that a GPU machine may lack.
printf '[pytest]\naddopts = --import-mode=importlib\npythonpath = %s\nmarkers = gpu\n' "$root/tests" >pytest.ini
gpu_tests() { "${limited[@]}" "$python" -m pytest -q -c pytest.ini --rootdir "$root" -m gpu "$@" "$root/tests/gpu"; }
script() { "${limited[@]}" "$python" "$root/benchmarks/$1.py" "${@:2}"; }

# What is run: the 8B shape in bfloat16 on a GPU, next to nothing in a dry run. `json` is the stage's file.
if [ -z "$dry" ]; then
    big=(--shape 8b --dtype bfloat16 --prompt-tokens 512 --output-tokens 64 --batch 1,32,256)
    smoke() { bench --shape 100m --dtype bfloat16 --no-compiled --batch 4 --rounds 1 --quick --output "$json"; }
    decode() { bench "${big[@]}" --prefill 1x2048,1x8192 --output "$json" \
        --modes idle-additive,idle,shared-offsets,distinct-offsets,distinct-loreft,distinct-low-rank; }
    kernels() { script kernels --shape 8b --layers 4 --dtype bfloat16 --batch 32 --prompt-tokens 512 --output "$json"; }
    ops() { script ops --output "$json"; }
    lora() { bench "${big[@]}" --modes lora,eager --output "$json"; }
    tests() { gpu_tests; }
    curve() { bench "${big[@]}" --batch 256 --distinct 1,8,32,64,128,256 --output "$json" \
        --modes distinct-offsets,distinct-loreft,distinct-low-rank; }
    step() { script step --output "$json"; }
    training() { script training --shape 1b --dtype bfloat16 --output "$json"; }
    loading() { script loading --shape 8b --dtype bfloat16 --quick --output "$json"; }
    prefix() { script prefix --shape 8b --dtype bfloat16 --quick --output "$json"; }
    serving() { script serving --shape 8b --dtype bfloat16 --memory 0.3 --rounds 3 --concurrency 256 --distinct 256 \
        --modes idle,shared,distinct-256 --output "$json"; }
else
    small=(--shape tiny --no-compiled --rounds 1 --output-tokens 8 --batch 2)
    smoke() { bench "${small[@]}" --modes idle --output "$json"; }
    decode() { bench "${small[@]}" --prefill 1x32 --modes idle-additive,distinct-offsets,distinct-low-rank --output "$json"; }
    kernels() { script kernels --shape tiny --eager --batch 2 --steps 2 --modes idle --output "$json"; }
    ops() { script ops --quick --output "$json"; }
    lora() { bench "${small[@]}" --modes lora,eager --output "$json"; }
    tests() { gpu_tests --collect-only; }
    curve() { bench "${small[@]}" --distinct 1,2 --modes distinct-offsets --output "$json"; }
    step() { script step --requests 4 --repeats 4 --output "$json"; }
    training() { script training --shape tiny --batch 1 --tokens 16 --rounds 1 --output "$json"; }
    loading() { script loading --shape tiny --eager --loads 2 --requests 2 --many 0 --rounds 1 --output "$json"; }
    prefix() { script prefix --shape tiny --eager --tenants 2 --system-tokens 256 --rounds 1 --output "$json"; }
    serving() { script serving --shape tiny --eager --modes idle --concurrency 2 --waves 1 --rounds 1 --output "$json"; }
fi

failed=0
for stage in "${chosen[@]}"; do
    seconds=$(((minutes * 60 - SECONDS) * WEIGHT[$stage] / total))
    total=$((total - WEIGHT[$stage]))
    [ $seconds -gt $MARGIN ] || { echo "$stage: no time is left" | tee -a "$out/summary.txt"; failed=1; continue; }
    limited=(timeout --signal=INT --kill-after=25 $seconds)
    json=$out/$stage.json
    rm -f "$json"
    echo "===== $stage, at most $seconds s" | tee -a "$out/log.txt"
    began=$SECONDS
    "$stage" >>"$out/log.txt" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    printf '%-9s %4d s  %s%s\n' "$stage" $((SECONDS - began)) \
        "$([ $status -eq 0 ] && echo passed || echo "ended with $status")" \
        "$([ -s "$json" ] && echo ", $(basename "$json")")" | tee -a "$out/summary.txt"
done

"$python" - "$commit" "$out"/*.json <<'END'
import json, sys
from pathlib import Path
for path in map(Path, sys.argv[2:]):
    if path.exists():
        result = json.loads(path.read_text())
        result["commit"] = result["commit"] or sys.argv[1] or None
        path.write_text(json.dumps(result, indent=1) + "\n")
END
exit $failed

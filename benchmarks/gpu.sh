#!/usr/bin/env bash
# Everything that wants a GPU: does it run, what does it cost, where does the rest go.
#
#   benchmarks/gpu.sh [--minutes N] [--commit HASH] [--dry-run] [--print] FOLDER [STAGE ...]
#
# Needs a python3 (or .venv here) with vLLM's CUDA build. What is measured is the tree that this script lies in: where
# another one is installed, or none, this one is installed into a scratch folder and goes before it. Writes a JSON file
# for each stage that measures, and adds to log.txt and summary.txt in FOLDER. The stages named (none: table) share the
# minutes by what they want, and what one leaves goes to those behind it. Where smoke fails the rest is not run; another
# that fails, or runs out of time, does not stop those behind it. What `steer-vllm bench`, serving, ops, http and loading
# have measured by then is kept. What is to stay goes from FOLDER into benchmarks/results/; `python benchmarks/report.py`
# makes RESULTS.md of it.
#
# --minutes: in all, by default as many as the stages want. --commit: what the results say of a copy without .git.
# --dry-run: the stages on a CPU at the smallest sizes. --print: only say what would be run.
set -uo pipefail

# What fits into ten minutes together, unpacking and ending included. First whether it is right; then the table of
# targets without prefix cache, in as many rounds as fit. `decode few additive lora` measure the same and LoRA's row,
# with time for the five rounds that a verdict needs.
CALLS=("smoke tests exact kernels" "table" "decode" "few" "additive lora" "ops step http prefix" "loading" "serving"
    "decode-cached" "few-cached" "curve" "training sleeping")
DEFAULT="table"
# Seconds that each wants, estimated.
declare -A WANTS=([smoke]=110 [tests]=120 [exact]=180 [kernels]=100 [table]=510 [decode]=510 [few]=510 [additive]=170
    [lora]=340 [ops]=80 [step]=70 [http]=180 [prefix]=180 [loading]=510 [serving]=510 [decode-cached]=510
    [few-cached]=510 [curve]=510 [training]=150 [sleeping]=240)
MARGIN=25                                                    # seconds in which engines end and results are written

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    echo "Stages, in calls of at most ten minutes:"
    printf '  %s\n' "${CALLS[@]}"
    exit "$1"
}

minutes="" commit="" dry="" print=""
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=${2:-}; shift ;;
        --commit) commit=${2:-}; shift ;;
        --dry-run) dry=yes ;;
        --print) print=yes ;;
        --help | -h) usage 0 ;;
        -*) echo "gpu.sh: unknown option $1" >&2; usage 2 >&2 ;;
        *) break ;;
    esac
    shift
done
[[ $minutes =~ ^[1-9][0-9]*$|^$ ]] || { echo "gpu.sh: --minutes $minutes: expected a number" >&2; exit 2; }
[ $# -gt 0 ] || { echo "gpu.sh: which folder?" >&2; usage 2 >&2; }
folder=$1
shift
read -ra chosen <<<"${*:-$DEFAULT}"
total=0
for stage in "${chosen[@]}"; do
    [ -n "${WANTS[$stage]:-}" ] || { echo "gpu.sh: unknown stage $stage" >&2; usage 2 >&2; }
    total=$((total + WANTS[$stage]))
done
left=$((${minutes:-0} * 60))
[ -n "$minutes" ] || left=$total

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$(command -v python3)
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
run() {
    if [ -n "$print" ]; then printf '%q ' "$stage" python "$@"; echo; else "${limited[@]}" "$python" "$@"; fi
}
bench() { run -m steer_vllm.cli bench --within $((seconds - MARGIN)) --output "$json" "$@"; }
script() { run "$root/benchmarks/$1.py" --output "$json" "${@:2}"; }
gpu_tests() { run -m pytest -q -c "$scratch/pytest.ini" --rootdir "$root" -m gpu "$@"; }

# The loads and modes of the table of targets. At a batch of 256 an engine takes 45 GB, and on a GPU of 141 GB that is
# three: plain, steered, and without low-rank rows, which has a stage of its own where rounds are to be many. Fewer
# requests leave room for a fourth, `control`.
large=(--shape 8b --dtype bfloat16 --prompt-tokens 512 --output-tokens 256)
prefill=(--prefill 1x8192,4x2048,1x2048)
steered=idle,shared-offsets,distinct-offsets,distinct-loreft,distinct-low-rank

# What each stage runs; `json` is its file. On a GPU, and in a dry run.
if [ -z "$dry" ]; then
    smoke() { bench --shape 100m --dtype bfloat16 --no-compiled --batch 4 --rounds 1 --modes idle,distinct-low-rank; }
    table() { bench "${large[@]}" --batch 256,32,1 "${prefill[@]}" --modes "idle-additive,$steered"; }
    decode() { bench "${large[@]}" --batch 256 --modes "$steered"; }
    few() { bench "${large[@]}" --batch 32,1 "${prefill[@]}" --modes "control,idle-additive,$steered"; }
    additive() { bench "${large[@]}" --batch 256 --modes idle-additive; }
    lora() { bench "${large[@]}" --batch 256,32,1 "${prefill[@]}" --modes lora; }
    decode-cached() { bench "${large[@]}" --prefix-cache --batch 256 --modes "idle-additive,$steered"; }
    few-cached() { bench "${large[@]}" --prefix-cache --batch 32,1 "${prefill[@]}" --modes "idle-additive,$steered"; }
    curve() { bench "${large[@]}" --batch 256 --distinct 1,32,256 --modes distinct-offsets,distinct-low-rank; }
    kernels() { script kernels --shape 8b --layers 4 --dtype bfloat16 --batch 32 --prompt-tokens 512; }
    ops() { script ops; }
    step() { script step; }
    http() { script http_path --dtype bfloat16 --memory 0.03 --requests 16 --rounds 5; }
    loading() { script loading --shape 8b --dtype bfloat16; }
    prefix() { script prefix --shape 8b --dtype bfloat16; }
    serving() {
        script serving --shape 8b --dtype bfloat16 --concurrency 256 --waves 2 --distinct 64,256 --rounds 3 \
            --modes idle,shared,distinct-64,distinct-256
    }
    training() { script training --shape 1b --dtype bfloat16; }
    tests() { gpu_tests "$root/tests/gpu/test_ops.py"; }
    exact() { gpu_tests "$root/tests/gpu/test_engine.py"; }
    # One process for each: vLLM's allocator for sleep mode serves one engine in a process.
    sleeping() {
        local test failed=0 limited=("${limited[@]:0:3}" $((seconds / 4)))
        for test in '1-eager' '2-eager' '1-graphs' '2-graphs'; do
            gpu_tests "$root/tests/gpu/test_sleep.py::test_answers_after_waking_up[$test]" || failed=1
        done
        return $failed
    }
else
    small=(--shape tiny --no-compiled --rounds 1 --output-tokens 8 --batch 2)
    smoke() { bench "${small[@]}" --modes idle,distinct-low-rank; }
    table() { bench "${small[@]}" --prefill 2x32 --modes idle-additive,idle,distinct-loreft; }
    decode() { bench "${small[@]}" --modes control,idle,distinct-offsets; }
    few() { bench "${small[@]}" --prefill 2x32 --modes idle-additive,distinct-low-rank; }
    additive() { bench "${small[@]}" --modes idle-additive; }
    lora() { bench "${small[@]}" --modes lora; }
    decode-cached() { bench "${small[@]}" --prefix-cache --modes distinct-loreft; }
    few-cached() { bench "${small[@]}" --prefix-cache --prefill 2x32 --modes idle; }
    curve() { bench "${small[@]}" --distinct 1,2 --modes distinct-offsets; }
    kernels() { script kernels --shape tiny --eager --batch 2 --steps 2 --modes idle; }
    ops() { script ops --quick; }
    step() { script step --requests 4 --repeats 4; }
    http() { script http_path --eager --streams 2 --requests 4 --rounds 1; }
    loading() { script loading --shape tiny --eager --loads 2 --requests 2 --many 0 --rounds 1; }
    prefix() { script prefix --shape tiny --eager --tenants 2 --system-tokens 256 --rounds 1; }
    serving() { script serving --shape tiny --eager --modes idle --concurrency 2 --waves 1 --rounds 1; }
    training() { script training --shape tiny --batch 1 --tokens 16 --rounds 1; }
    tests() { gpu_tests --collect-only "$root/tests/gpu/test_ops.py"; }
    exact() { gpu_tests --collect-only "$root/tests/gpu/test_engine.py"; }
    sleeping() { gpu_tests --collect-only "$root/tests/gpu/test_sleep.py"; }
fi

if [ -n "$print" ]; then
    scratch=. seconds=600
    for stage in "${chosen[@]}"; do json=$stage.json; "$stage"; done
    exit 0
fi

mkdir -p "$folder" && out=$(cd "$folder" && pwd) || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 PYTHONUNBUFFERED=1 TMPDIR=$scratch
export PYTORCH_NVML_BASED_CUDA_CHECK=1                       # to ask for a GPU sets up no driver before vLLM forks
cd "$out" || exit 2                                          # so that recorded commands name no folder of this machine

installed() { "$python" -c 'import steer_vllm.training; print(steer_vllm.__file__)' 2>/dev/null; }
if [[ $(installed) != "$root"/* ]]; then
    source=$scratch/source
    mkdir "$source" || exit 2
    cp -r "$root"/{pyproject.toml,setup.py,README.md,LICENSE,steer_vllm,training,server} "$source" || exit 2
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$scratch/site" "$source" || exit 2
    export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
    [[ $(installed) = "$scratch"/* ]] || { echo "gpu.sh: $root could not be put before $(installed)" >&2; exit 2; }
fi
# Of an installed tree the results know no commit.
if [ -z "$commit" ] && commit=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null); then
    [ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] || commit+=+
fi
# The project's own settings for pytest need plugins that a GPU machine may lack.
settings='[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\npythonpath = %s\nmarkers = gpu\n'
printf "$settings" "$root/tests" >"$scratch/pytest.ini"

finish() {                                                   # JSON: the commit, where it says none
    "$python" - "$commit" "$1" <<'END'
import json, sys
from pathlib import Path
path = Path(sys.argv[2])
result = json.loads(path.read_text())
result["commit"] = result.get("commit") or sys.argv[1] or None
path.write_text(json.dumps(result, indent=1) + "\n")
END
}

failed=0 deadline=$((SECONDS + left))
for stage in "${chosen[@]}"; do
    seconds=$(((deadline - SECONDS) * WANTS[$stage] / total))
    [ "$stage" = smoke ] && seconds=$((deadline - SECONDS < WANTS[smoke] ? deadline - SECONDS : WANTS[smoke]))
    total=$((total - WANTS[$stage]))
    [ $seconds -gt $MARGIN ] || { echo "$stage: no time is left" | tee -a summary.txt; failed=1; continue; }
    limited=(timeout --signal=INT --kill-after=25 $seconds)
    json=$stage.json
    rm -f "$json"
    echo "===== $stage, at most $seconds s" | tee -a log.txt
    began=$SECONDS
    "$stage" >>log.txt 2>&1
    status=$?
    [ -s "$json" ] && finish "$json"
    printf '%-13s %4d s  %s%s\n' "$stage" $((SECONDS - began)) \
        "$([ $status -eq 0 ] && echo passed || echo "ended with $status")" \
        "$([ -s "$json" ] && echo ", $json")" | tee -a summary.txt
    if [ $status -ne 0 ]; then
        failed=1
        sed -n "/^===== $stage,/,\$p" log.txt | tail -n 120
        if [ "$stage" = smoke ] && [ $status -ne 124 ] && [ $status -ne 137 ]; then
            echo "smoke has failed: the rest is not run" | tee -a summary.txt
            break
        fi
    fi
done
exit $failed

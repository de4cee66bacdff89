#!/usr/bin/env bash
# Check spinquant on a GPU, then measure the tables of transforms there.
#
#   benchmarks/gpu.sh [OUT]          # OUT: folder for the figures, by default `gpu`
#
# A cut-off run loses nothing: figures are lines of OUT/MODEL/figures.jsonl as soon as they are there, checks those of
# OUT/checks.jsonl. Rerun with the same OUT to go on. Settings, as variables:
#
#   DEVICE=cuda  JOBS=8  MINUTES=60 (of each model)  SEEDS=3  CHECKS=1  PYTHON=python3
#   MODELS, ROWS, SCHEMES, WEIGHTS: lists, such as MODELS="smollm2-135m gemma-3-270m"
#   EXTRA: further options of transforms.py, such as EXTRA="--samples 16 --windows 4"
#   LEARNED: folder for what is learned, by default OUT
set -u
cd "$(dirname "$0")/.."
out=${1:-gpu}
mkdir -p "$out"
device=${DEVICE:-cuda} python=${PYTHON:-python3} failed=0
models=${MODELS:-smollm2-135m qwen2.5-coder-0.5b gemma-3-270m}
rows=${ROWS:-none random closed-form local end-to-end}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ "${CHECKS:-1}" = 1 ]; then
    checks=()
    for name in llama qwen2 qwen3 gemma3; do
        "$python" benchmarks/device.py --device "$device" --tiny "$name" --json "$out/checks.jsonl" &
        checks+=($!)
    done
    "$python" benchmarks/device.py --device "$device" --tiny --model "${models%% *}" --json "$out/checks.jsonl" &
    checks+=($!)
    for check in "${checks[@]}"; do wait "$check" || failed=1; done
fi
for model in $models; do
    # shellcheck disable=SC2086
    "$python" benchmarks/transforms.py --model "$model" --device "$device" --jobs "${JOBS:-8}" \
        --minutes "${MINUTES:-60}" --seeds "${SEEDS:-3}" --rows $rows \
        --schemes ${SCHEMES:-W4A4KV4 W4A8KV8 W4A16} --weights ${WEIGHTS:-rtn gptaq rtn+tune64 gptaq+tune64} \
        --out "$out/$model" --learned "${LEARNED:-$out}/$model" ${EXTRA:-} || failed=1
done
exit $failed

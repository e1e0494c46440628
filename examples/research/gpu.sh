#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train presets on one GPU, one after the other, with the settings of the shipped checkpoints.
#
#     bash examples/research/gpu.sh DATA OUTPUT MINUTES [PRESET ...]
#
# DATA is a folder with train/*.jsonl.gz, validation.jsonl.gz and test.jsonl.gz (rows with `text`), MINUTES the budget of each
# preset; without presets, all. There is a checkpoint every ten minutes, and when `train.py` (not its workers) gets SIGTERM: the
# same command goes on from there, also with more minutes. The environment variables WINDOWS (per step) and WINDOW_BYTES override
# what fits 80 GB of memory; COMPILE=yes compiles the layers. OUTPUT/PRESET gets the checkpoint, its curve and results.json;
# `export.py` makes a published folder of it.
set -euo pipefail
if (($# < 3)); then
    sed -n '3,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
fi
[ "${COMPILE:-no}" = no ] || compile=--compile
here=$(cd "$(dirname "$0")" && pwd)
data=$1 output=$2 minutes=$3
shift 3
(($#)) || set -- stlm-10m-wide stlm-10m stlm-50m stlm-100m stlm-3m
for preset; do
    case $preset in stlm-50m | stlm-100m) windows=32 ;; *) windows=64 ;; esac
    python "$here/train.py" --train "$data/train/*.jsonl.gz" --validation "$data/validation.jsonl.gz" \
        --test "$data/test.jsonl.gz" --data "$output/data" --model "$preset" --max_minutes "$minutes" \
        --block_bytes "${WINDOW_BYTES:-4096}" --batch_size "${WINDOWS:-$windows}" --workers 4 ${compile:-} --eval_steps 1000 \
        --output "$output/$preset"
done

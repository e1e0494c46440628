#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train presets on one GPU, one after the other, much as `stlm-10m-wide` was trained before it learned to loop less.
#
#     bash examples/research/gpu.sh DATA OUTPUT MINUTES [PRESET ...]
#
# DATA is a folder with train/*.jsonl.gz, validation.jsonl.gz and test.jsonl.gz (rows with `text`; 200 documents or more to train
# on: in 5% a passage is repeated, 10% become documents of one of their sentences). MINUTES is the budget of each preset, a sixth
# of it for windows of four times the length at the end; without presets, all. There is a checkpoint every ten minutes, and when
# `train.py` (not its workers) gets SIGTERM: the same command goes on from there, also with more minutes. The environment
# variables WINDOWS (per step) and WINDOW_BYTES override what fits 80 GB of memory; COMPILE=yes compiles the layers in the first
# phase. OUTPUT/PRESET and OUTPUT/PRESET-long-MINUTES get the checkpoints of both phases, their curves and results.json.
# `export.py --run OUTPUT/PRESET --after OUTPUT/PRESET-long-MINUTES ...`, of the last MINUTES, publishes them.
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
length=${WINDOW_BYTES:-4096}
long=$(awk "BEGIN { print $minutes / 6 }") short=$(awk "BEGIN { print $minutes * 5 / 6 }")
train() { # folder of the run, windows per step, their length, minutes, other arguments
    python "$here/train.py" --train "$data/train/*.jsonl.gz" --validation "$data/validation.jsonl.gz" \
        --test "$data/test.jsonl.gz" --data "$output/data" --repeat 0.05 --sentences 0.1 --workers 4 --eval_steps 1000 \
        --output "$output/$1" --batch_size "$2" --block_bytes "$3" --max_minutes "$4" "${@:5}"
}
for preset; do
    case $preset in stlm-50m | stlm-100m) windows=32 ;; *) windows=64 ;; esac
    windows=${WINDOWS:-$windows}
    train "$preset" "$windows" "$length" "$short" --model "$preset" --set rope_theta=40000 ${compile:-}
    train "$preset-long-$minutes" $(((windows + 3) / 4)) $((4 * length)) "$long" --checkpoint "$output/$preset" \
        --muon_lr 0.004 --adamw_lr 0.0008 --decay 0.9
done

#!/usr/bin/env bash
# What SLIM and LoRA learn from 48 examples and forget, and what an ordinary LoRA that was exported
# from SLIM loses (docs/results/tune.md).
#
#   benchmarks/tune_few.sh OUTPUT [SEED...]
#
# Trains both on the examples of `make demo`, exports SLIM, and scores all three with the same
# commands: OUTPUT/slim-SEED.json, lora-SEED.json and exported-SEED.json, by default for seed 0.
# Some ten minutes of one core a seed. BUDWOOD names the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

output=${1:?folder for the records}
shift
budwood=${BUDWOOD:-budwood} data=examples/tune
folder=$(mktemp -d)
mkdir -p "$output"
trap 'rm -rf "$folder"' EXIT

for seed in "${@:-0}"; do
    for method in slim lora; do
        $budwood tune $data/train.jsonl --output "$folder/$method" --method $method --steps 40 --batch 12 \
            --seed "$seed"
    done
    $budwood tune export-lora "$folder/slim" --output "$folder/exported" \
        --calibration $data/train.jsonl --held-out $data/test.jsonl
    for adapter in slim lora exported; do
        $budwood tune eval "$folder/$adapter" --target $data/test.jsonl --general $data/general.jsonl \
            --prompts 32 --seed "$seed" --out "$output/$adapter-$seed.json"
    done
    rm -rf "${folder:?}"/*
done

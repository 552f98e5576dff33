#!/usr/bin/env bash
# What an ordinary LoRA loses against the SLIM adapter that it was exported from (docs/tune.md).
#
#   benchmarks/tune_export.sh OUTPUT
#
# Trains SLIM on the examples of `make demo`, exports it, and scores both: OUTPUT/tune-export-slim.json
# and OUTPUT/tune-export-lora.json. Four minutes of one core. BUDWOOD names the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

output=${1:?folder for the records}
budwood=${BUDWOOD:-budwood} data=examples/tune
folder=$(mktemp -d)
mkdir -p "$output"
trap 'rm -rf "$folder"' EXIT

$budwood tune $data/train.jsonl --output "$folder/slim" --steps 20 --batch 12 --lr 8e-3
$budwood tune export-lora "$folder/slim" --output "$folder/lora" \
    --calibration $data/train.jsonl --held-out $data/test.jsonl
for adapter in slim lora; do
    $budwood tune eval "$folder/$adapter" --target $data/test.jsonl --general $data/general.jsonl \
        --prompts 32 --out "$output/tune-export-$adapter.json"
done

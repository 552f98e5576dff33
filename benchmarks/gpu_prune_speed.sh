#!/usr/bin/env bash
# Time pruning on models of the published 7B shapes, with random weights: bf16, SDPA, one GPU.
#
#     benchmarks/gpu_prune_speed.sh [FOLDER]
#
# Writes FOLDER/prune-speed-gpu-SHAPE.json, by default into benchmarks/results. Takes at most ten
# minutes: a shape that is not done in 190 s is given up. Needs 24 GiB of GPU memory. TINY=1 tries the
# script on a CPU, with models that are small and records that mean nothing.
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
budwood=${BUDWOOD:-budwood}

time_shape() { # NAME KEEP LAYERS WIDTH VISION_LAYERS VISION_WIDTH VISION_HEAD
    local size=(--layers "$3" --width "$4" --vision-layers "$5" --vision-width "$6")
    local how=(--device cuda:0 --dtype bfloat16 --repeats 7 --new-tokens 32 --threads 1,4,8)
    if [ "${TINY:-}" ]; then
        size=(--layers 1 --width 128 --vision-layers 2 --vision-width "$7")
        how=(--device cpu --dtype float32 --repeats 1 --new-tokens 2 --threads 1,2)
    fi
    timeout 190 $budwood bench prune-speed --shape "$1" --keep "$2" "${size[@]}" "${how[@]}" \
        --out "$out/prune-speed-gpu-$1.json" --force || echo "$1: given up ($?)" >&2
}

time_shape llava-1.5 192,128,64 32 4096 24 1024 64
time_shape llava-next 640,320,160 32 4096 24 1024 64
time_shape qwen2.5-vl 0.25,0.1 28 3584 32 1280 80

#!/usr/bin/env bash
# SLIM beside other ways of fine-tuning on targets that a small model learns (docs/results/tune.md).
#
#   benchmarks/tune_learn.sh DATA OUTPUT [STAGE...]
#
# DATA holds the files of the general tasks that docs/tune.md lists, and arc_challenge_train.jsonl,
# and piqa_validation.jsonl if --general is to have it (PIQA=1); the targets bring their data. OUTPUT
# is a new folder. Stages, in this order and all of them by default:
#   sweep     each method at its learning rates, one seed, also rewound to strengths 0.7 and 0.5
#   final     two more seeds of each method, at the rate that did best on validation questions
#   few       48 examples of examples/tune: LoRA and SLIM as `budwood tune` trains them
#   closed    OpenBookQA, BoolQ and ARC-Easy for 600 steps, LoRA and SLIM, in OUTPUT-closed
# Each finished run is a record in OUTPUT/runs, so a script that was stopped goes on where it was when
# it is started again: copy benchmarks/results/tune-learn to OUTPUT to go on from what is kept. A run
# of 400 steps takes some 17 minutes of one core, of which the training takes 15. BUDWOOD names the
# command.
set -euo pipefail

data=${1:?folder with the data} output=${2:?folder for runs and records}
shift 2
stages=("${@:-}")
[ -n "${stages[0]}" ] || stages=(sweep final few closed)

budwood=${BUDWOOD:-budwood}
general=winogrande,social_iqa,gsm8k,arc_challenge
[ -z "${PIQA:-}" ] || general+=,piqa
settings=(
    --batch 8 --max-length 192 --per-task 600 --windows 16 --prompts 32 --n-validation 60
    --limit 120 --general-limit 100 --general "$general" --probe-every 0 --strengths 0.7,0.5
    --dtype bfloat16
)
# Rotations and singular directions take higher and lower rates than low-rank differences do.
usual=lora,lora-r10,lora-wd:weight_decay=30,lora-wd:weight_decay=10,lora-wd:weight_decay=3,dora
usual+=,lora-kl,lora-own,lora-mask,moe,corda,slim

compare() {
    "$budwood" bench tune --data "$data" --output "$output" "${settings[@]}" --steps 400 "$@"
}

for stage in "${stages[@]}"; do
    case $stage in
        sweep)
            compare --methods "$usual" --lrs 1e-3,3e-3,1e-2 --seeds 0
            compare --methods oft --lrs 3e-3,1e-2,3e-2 --seeds 0
            compare --methods osf --lrs 1e-4,3e-4,1e-3 --seeds 0
            ;;
        final) compare --methods "$usual,oft,osf" --lrs tried --seeds 0,1,2 ;;
        few)
            for method in lora slim; do
                "$budwood" tune examples/tune/train.jsonl --output "$output-few-$method" \
                    --method "$method" --steps 40 --batch 12
                "$budwood" tune eval "$output-few-$method" --target examples/tune/test.jsonl \
                    --general examples/tune/general.jsonl --text "$data/wikitext2_valid.txt" \
                    --windows 16 --prompts 32 --out "$output-few-$method.json" --force
            done
            ;;
        closed)
            "$budwood" bench tune --data "$data" --output "$output-closed" "${settings[@]}" \
                --targets openbookqa,boolq,arc_easy --per-task 2000 --steps 600 \
                --methods lora,slim --lrs 3e-3,1e-2 --seeds 0
            ;;
        *) echo "unknown stage $stage; known: sweep final few closed" >&2; exit 2 ;;
    esac
done

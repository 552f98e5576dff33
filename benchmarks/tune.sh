#!/usr/bin/env bash
# All runs behind the comparison of SLIM with other ways of fine-tuning (docs/results/tune.md).
#
#   benchmarks/tune.sh DATA OUTPUT [STAGE...]
#
# DATA holds the files that docs/tune.md lists; OUTPUT is a new folder. The runs that are kept in
# benchmarks/results/tune are of SLIM's former options (docs/results/tune.md), and are not continued
# with today's. Stages, in this order and all of them by default:
#   sweep      each method at each learning rate, one seed
#   ablation   SLIM without each of its parts, at its rate, and others of which as much is kept
#   final      two more seeds of each method, at the rate that did best on validation questions
#   curves     LoRA and SLIM at their rates, with the course of training, in OUTPUT-curves
#   speed      forward and backward beside LoRA, in OUTPUT-speed.json and OUTPUT-speed-4096.json
# Each finished run is a record in OUTPUT/runs, so a script that was stopped goes on where it was
# when it is started again; OUTPUT/record.json is that of the last of the first three. On one core a
# run trains for 10 to 20 minutes, is validated in 5 and tested in 15. BUDWOOD names the command.
set -euo pipefail

data=${1:?folder with the data} output=${2:?folder for runs and records}
shift 2
stages=("${@:-}")
[ -n "${stages[0]}" ] || stages=(sweep ablation final curves speed)

budwood=${BUDWOOD:-budwood}
methods=lora,lora-wd:weight_decay=30,dora,lora-kl,moe,slim
ablations=slim-no-identity,slim-no-router,slim-whitened,slim-no-clustering,slim-no-yielding
ablations+=,slim-merging,slim-answers,slim-no-l1,slim-paper
settings=(
    --steps 200 --batch 8 --max-length 160 --per-task 1100 --n-validation 150
    --windows 32 --prompts 32 --dtype bfloat16
    --targets openbookqa,boolq,arc_easy --general winogrande,social_iqa,gsm8k
)

compare() {
    "$budwood" bench tune --data "$data" --output "$output" "${settings[@]}" \
        --limit 400 --general-limit 200 --probe-every 0 "$@"
}

curves() {
    "$budwood" bench tune --data "$data" --output "$output-curves" "${settings[@]}" \
        --limit 40 --general-limit 40 --probe-every 25 --seeds 0 "$@"
}

for stage in "${stages[@]}"; do
    case $stage in
        sweep) compare --methods "$methods" --lrs 1e-3,3e-3,1e-2 --seeds 0 ;;
        ablation)
            compare --methods "$ablations" --lrs 1e-2 --seeds 0
            compare --methods lora:strength=0.7 --lrs 3e-3 --seeds 0
            compare --methods lora-wd:weight_decay=30+strength=0.7 --lrs 1e-3 --seeds 0
            ;;
        final) compare --methods "$methods" --lrs tried --seeds 0,1,2 ;;
        curves)
            curves --methods lora --lrs 3e-3
            curves --methods slim --lrs 1e-2
            curves --methods lora,slim --lrs tried
            ;;
        speed)
            "$budwood" bench tune-speed --widths 576,2048 --out "$output-speed.json" --force
            "$budwood" bench tune-speed --widths 4096 --tokens 256,1024 \
                --out "$output-speed-4096.json" --force
            ;;
        *) echo "unknown stage $stage; known: sweep ablation final curves speed" >&2; exit 2 ;;
    esac
done

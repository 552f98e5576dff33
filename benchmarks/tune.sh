#!/usr/bin/env bash
# All runs behind the comparison of SLIM with other ways of fine-tuning (docs/tune.md, "Compare").
#
#   benchmarks/tune.sh DATA OUTPUT [STAGE...]
#
# DATA holds the files that docs/tune.md lists; OUTPUT is benchmarks/results/tune for the runs that
# are kept here, without their adapters. Stages, in this order and all of them by default:
#   sweep      each method at each learning rate, one seed
#   final      two more seeds at the rate that did best on validation questions
#   ablation   SLIM without each of its parts, and its variants, each with its own rates
#   seeds      two more seeds of those
#   speed      forward and backward beside LoRA
# Each finished run is a record in OUTPUT, so a script that was stopped goes on where it was when it
# is started again. Later stages read the runs of earlier ones. BUDWOOD names the command.
set -euo pipefail

data=${1:?folder with the data} output=${2:?folder for runs and records}
shift 2
stages=("${@:-}")
[ -n "${stages[0]}" ] || stages=(sweep final ablation seeds speed)

budwood=${BUDWOOD:-budwood}
methods=lora,lora:strength=0.7,lora-wd:weight_decay=10,lora-wd:weight_decay=30,lora-late
methods+=,dora,lora-kl,lora-own,moe,slim-paper,slim
ablations=slim-no-identity,slim-no-router,slim-no-clustering,slim-no-yielding,slim-no-merging
ablations+=,slim-no-l1,slim:strength=1,slim:margin=1.5,slim-whitened,slim-max,slim-rms
ablations+=,slim-all-tokens,slim-all-layers,slim-by-module,slim-mask
settings=(
    --steps 200 --batch 8 --max-length 160 --per-task 1100 --n-validation 150
    --limit 400 --general-limit 200 --windows 32 --prompts 32 --probe-every 0
    --lrs 1e-3,3e-3,1e-2
)

compare() {
    "$budwood" bench tune --data "$data" --output "$output" "${settings[@]}" "$@"
}

for stage in "${stages[@]}"; do
    case $stage in
        sweep) compare --methods "$methods" --seeds 0 ;;
        final) compare --methods "$methods" --seeds 0,1,2 ;;
        ablation) compare --methods "$methods,$ablations" --seeds 0 ;;
        seeds) compare --methods "$methods,$ablations" --seeds 0,1,2 ;;
        speed) "$budwood" bench tune-speed --out "$output/speed.json" --force ;;
        *) echo "unknown stage $stage; known: sweep final ablation seeds speed" >&2; exit 2 ;;
    esac
done

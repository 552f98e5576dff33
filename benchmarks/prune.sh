#!/usr/bin/env bash
# All runs behind the comparison of pruning methods (docs/results/prune.md).
#
#   benchmarks/prune.sh OUTPUT [STAGE...]
#
# OUTPUT is a folder for the records; benchmarks/results has those that are kept. Stages, in this
# order and all of them by default:
#   high       large pictures, every method, original positions: prune-high.json
#   many       the best methods and the baselines on more of them: prune-many.json
#   quarter    every method with a quarter of the tokens: prune-quarter.json
#   ablation   AdaV and adav+ with other parameters: prune-ablation.json
#   published  positions counted anew, as methods were published: prune-compact.json
#   inside     FastV and PyramidDrop, which prune inside the LLM: prune-inside.json
#   small      small pictures of 256 tokens: prune-256.json
#   shifted    looks outside the range of training: prune-shifted.json
#   question   which text counts as the question: prune-question.json
#   turns      chats of two turns: prune-turns.json
# many, quarter and ablation take over what `high` answered. A stage that was stopped goes on where it
# was when the script is started again. Two cores give some 15 answers a second: 20 methods
# at three budgets on 160 scenes take an hour and a quarter. SCENES is the number of scenes of `high`,
# by default 300; the other stages follow from it. EARLIER is a record of fewer scenes that `high`
# takes over, such as benchmarks/results/prune-high.json. BUDWOOD names the command.
set -euo pipefail

output=${1:?folder for the records}
shift
stages=("${@:-}")
all=(high many quarter ablation published inside small shifted question turns)
[ -n "${stages[0]}" ] || stages=("${all[@]}")
mkdir -p "$output"

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
scenes=${SCENES:-300}
ours=adav+,adav,adav-official,adav-contrast
peers=scope,mmtok,divprune,cdpruner,eadp,tops,prunesid,vispruner,visionzip,prumerge-plus
centred=cen-divprune,cen-cdpruner,cen-scope
baselines=fastervlm,t2i,random,uniform
every=$ours,$peers,$centred,$baselines,overview
best=adav+,scope,cen-scope,vispruner,mmtok
variants=adav:reserve=0,adav:reserve=0.5,adav:temperature=30,adav:temperature=300
variants+=,adav-contrast:reserve=0,adav+:focus=0,adav+:focus=64,adav+:text_weight=0+reserve=0
variants+=,adav+:reach=1000

measure() {
    record "$output/prune-$1.json" prune --question current --dtype bfloat16 --workers 2 "${@:2}"
}

# Large pictures of seed 1; adav+ was designed on validation scenes.
large() {
    local name=$1
    shift
    local earlier=(--reuse "$output/prune-high.json")
    [ "$name" != high ] || earlier=(${EARLIER:+--reuse "$EARLIER"})
    measure "$name" --seed 1 --positions original --timed 8 "${earlier[@]}" "$@"
}

for stage in "${stages[@]}"; do
    case $stage in
    high) large high --scenes "$scenes" --methods "$every" --keep 0.1,0.05,0.025 ;;
    many)
        large many --scenes $((scenes * 10 / 3)) --methods "$best,adav,$baselines" \
            --keep 0.1,0.05,0.025
        ;;
    quarter) large quarter --scenes "$scenes" --methods "$every" --keep 0.25 ;;
    ablation)
        large ablation --scenes "$scenes" --methods "$ours,$variants,fastervlm,t2i" \
            --keep 0.1,0.05,0.025
        ;;
    published)
        measure compact --seed 1 --scenes $((scenes / 2)) --methods "$every" \
            --positions compact --keep 0.1,0.05,0.025 --timed 2
        ;;
    inside)
        measure inside --seed 1 --scenes $((scenes / 5)) --methods fastv,pyramiddrop,adav+,adav,random \
            --positions original --keep 0.1,0.05 --timed 8
        ;;
    small)
        measure 256 --model sprout-256 --seed 1 --scenes $((scenes / 2)) --methods "$every" \
            --positions original --keep 0.25,0.11,0.055 --timed 6
        ;;
    shifted)
        measure shifted --seed 1 --split shifted --scenes $((scenes / 2)) \
            --methods "$best,adav,$baselines" --positions original --keep 0.1,0.05 --timed 1
        ;;
    question)
        measure question --seed 1 --scenes "$scenes" --methods adav,adav-contrast,t2i \
            --question turn,all --positions original --keep 0.05 --timed 1
        ;;
    turns)
        measure turns --seed 1 --turns 2 --scenes $((scenes / 2)) --methods adav,adav-contrast,adav+ \
            --question all,turn,current --positions original --keep 0.05 --timed 1
        ;;
    *)
        echo "there is no stage $stage; give ${all[*]}" >&2
        exit 2
        ;;
    esac
done

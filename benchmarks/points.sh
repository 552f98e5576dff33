#!/usr/bin/env bash
# All runs behind the comparison of ways to adapt point encoders (docs/results/points.md).
#
#   benchmarks/points.sh OUTPUT [STAGE...]
#
# OUTPUT is an empty folder for the records; benchmarks/results has those that are kept. Stages, in
# this order and all of them by default:
#   start    both encoders on road objects, without adaptation: points-road.json and -road-dense
#   random   indoor, adapted to random points: points.json, points-peers.json, points-sparse.json
#            and points-streams.json
#   lidar    indoor, adapted to points as a LiDAR sees them: points-lidar….json
#   default  the same as random and lidar for the default encoder: points-default….json
#   road     road objects, adapted to points as a LiDAR sees them: points-road-adapted.json,
#            points-road-more.json, points-road-peers.json and points-road-deep.json
# `random` and `lidar` are about sprout-dense, which was trained on dense clouds as published ones
# are; `default` and `road` about sprout.
# A record is written after each method, so a script that was stopped goes on where it was when it
# is started again. On one core `start` takes about two minutes, the others hours: a method that
# trains takes two to seven minutes six times, for three seeds and three rates. BUDWOOD names the
# command.
set -euo pipefail

output=${1:?folder for the records}
shift
stages=("${@:-}")
[ -n "${stages[0]}" ] || stages=(start random lidar default road)
mkdir -p "$output"

source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
ours=sparse-lora,sparse-full
free=frozen,tokens,adabn,t3a
streams=uni-adapter,point-cache
papers=esp-zero,tent,esp-zero-paper
peers=lora,full,vpt-shallow,vpt-deep
first=tokens,adabn,sparse-lora
untrained=frozen,t3a,$streams
rest=sparse-full,tent,esp-zero-paper,full,vpt-shallow,vpt-deep
tuned=(--occluded 128,64 --tune)
seen_by_lidar=(--points "" "${tuned[@]}" --sampler lidar)
dense=(--encoder sprout-dense)

measure() {
    record "$output/$1.json" points "${@:2}"
}

for stage in "${stages[@]}"; do
    case $stage in
    start)
        start=(--part road --methods frozen,tokens --points "" --lidar 128,64 --occluded 128,64)
        measure points-road "${start[@]}"
        measure points-road-dense "${start[@]}" "${dense[@]}"
        ;;
    random)
        measure points "${dense[@]}" --methods "$free,$papers" "${tuned[@]}"
        measure points-peers "${dense[@]}" --methods "$peers" "${tuned[@]}"
        measure points-sparse "${dense[@]}" --methods "$ours" "${tuned[@]}"
        measure points-streams "${dense[@]}" --methods "$streams" "${tuned[@]}"
        ;;
    lidar)
        lidar=("${dense[@]}" --lidar 256,128,64,32 "${seen_by_lidar[@]}")
        measure points-lidar "${lidar[@]}" --methods "$first"
        measure points-lidar-more "${lidar[@]}" --methods "$untrained,lora,esp-zero"
        measure points-lidar-peers "${lidar[@]}" --methods "$rest"
        ;;
    default)
        measure points-default --methods "$free" "${tuned[@]}"
        measure points-default-more --methods "$streams,$papers" "${tuned[@]}"
        measure points-default-peers --methods "$peers" "${tuned[@]}"
        measure points-default-sparse --methods "$ours" "${tuned[@]}"
        lidar=(--lidar 256,128,64,32 "${seen_by_lidar[@]}")
        measure points-default-lidar "${lidar[@]}" --methods "$first"
        measure points-default-lidar-more "${lidar[@]}" --methods "$untrained,lora,esp-zero"
        measure points-default-lidar-peers "${lidar[@]}" --methods "$rest"
        ;;
    road)
        lidar=(--part road --lidar 128,64,32 "${seen_by_lidar[@]}")
        measure points-road-adapted "${lidar[@]}" --methods "$first"
        measure points-road-more "${lidar[@]}" --methods "$untrained"
        measure points-road-peers "${lidar[@]}" --methods "lora,esp-zero,${rest%,vpt-deep}"
        measure points-road-deep "${lidar[@]}" --methods vpt-deep
        ;;
    *)
        echo "there is no stage $stage; give start, random, lidar, default or road" >&2
        exit 2
        ;;
    esac
done

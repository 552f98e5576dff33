#!/usr/bin/env bash
# All runs behind the comparison of ways to adapt point encoders (docs/results/points.md).
#
#   benchmarks/points.sh OUTPUT [STAGE...]
#
# OUTPUT is an empty folder for the records; benchmarks/results has those that are kept. Stages, in
# this order and all of them by default:
#   start    the frozen encoder on road objects, without adaptation: points-road.json
#   random   indoor, adapted to random points: points.json, points-peers.json, points-sparse.json
#   lidar    indoor, adapted to points as a LiDAR sees them: points-lidar.json
#   road     road objects, adapted to points as a LiDAR sees them: points-road-adapted.json
# A record is written after each method, so a script that was stopped goes on where it was when it
# is started again. On one core `start` takes about two minutes, the others hours: a method that
# trains takes two to seven minutes six times, for three seeds and three rates. BUDWOOD names the
# command.
set -euo pipefail

output=${1:?folder for the records}
shift
stages=("${@:-}")
[ -n "${stages[0]}" ] || stages=(start random lidar road)
mkdir -p "$output"

budwood=${BUDWOOD:-budwood}
ours=sparse-lora,sparse-full
free=frozen,tokens,adabn,tent,t3a,uni-adapter,point-cache,esp-zero,esp-zero-paper
peers=lora,full,vpt-shallow,vpt-deep
seen_by_lidar=(--points "" --lidar 256,128,64,32 --occluded 128,64 --sampler lidar --tune)

measure() {
    local record="$output/$1.json"
    shift
    if [ -f "$record" ] && grep -q '"status": "complete"' "$record"; then
        echo "$record is complete"
        return
    fi
    "$budwood" bench points --out "$record" "$@"
}

for stage in "${stages[@]}"; do
    case $stage in
    start)
        measure points-road --part road --methods frozen,tokens \
            --points "" --lidar 128,64 --occluded 128,64
        ;;
    random)
        measure points --methods "$free" --occluded 128,64 --tune
        measure points-peers --methods "$peers" --occluded 128,64 --tune
        measure points-sparse --methods "$ours" --occluded 128,64 --tune
        ;;
    lidar) measure points-lidar --methods "$free,$peers,$ours" "${seen_by_lidar[@]}" ;;
    road)
        measure points-road-adapted --part road --methods "$free,$peers,$ours" \
            "${seen_by_lidar[@]}"
        ;;
    *)
        echo "there is no stage $stage; give start, random, lidar or road" >&2
        exit 2
        ;;
    esac
done

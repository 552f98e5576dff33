#!/usr/bin/env bash
# Requests a second and latency of served models, with and without pruning (docs/serve.md).
#
#   benchmarks/serve.sh OUTPUT [MODEL...]
#
# Writes OUTPUT/serve-sprout.json and OUTPUT/serve-2304.json: the embedded model with 256 visual
# tokens, and one of random weights with 2,304. For each it starts a stock vLLM server and a pruned
# one, which keeps a ninth, sends both the same requests, and stops them. About eight minutes in all
# on two cores. PYTHON is the Python of `make venv`, SERVING that of `make test-vllm`, OPTIONS are
# more options of `budwood bench serve`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

output=${1:?folder for the records}
shift
models=("${@:-}")
[ -n "${models[0]}" ] || models=(sprout 2304)
python=${PYTHON:-.venv/bin/python} serving=${SERVING:-.venv-vllm/bin/python}
folder=$(mktemp -d)
mkdir -p "$output"
started=()

stop() {
    for server in "${started[@]}"; do
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    done
    started=()
}
trap 'stop; rm -rf "$folder"' EXIT

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1
export VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=WARNING
export VLLM_CACHE_ROOT=$folder/cache OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

start() { # NAME PORT COMMAND...: wait until a server answers
    local log=$folder/$1.log port=$2
    shift 2
    "$serving" "$@" --host 127.0.0.1 --port "$port" --max-model-len 4096 --max-num-seqs 16 \
        --block-size 32 --enforce-eager >"$log" 2>&1 &
    started+=($!)
    for _ in $(seq 180); do
        if curl -sf "http://127.0.0.1:$port/health" >/dev/null; then return; fi
        kill -0 "${started[-1]}" 2>/dev/null || break
        sleep 1
    done
    tail -n 20 "$log" >&2
    echo "the server on port $port does not answer" >&2
    exit 1
}

"$python" benchmarks/serve_models.py "$folder"
for model in "${models[@]}"; do
    case $model in
        sprout) requests=8 ;;
        2304) requests=4 ;;
        *) echo "unknown model $model; known: sprout 2304" >&2; exit 2 ;;
    esac
    start full 8800 -m vllm.entrypoints.cli.main serve "$folder/$model" --served-model-name "$model"
    start pruned 8801 -m budwood.cli serve "$folder/$model" --served-model-name "$model" --keep 0.11
    # shellcheck disable=SC2086  # OPTIONS are words
    "$serving" -m budwood.cli bench serve full=http://127.0.0.1:8800 pruned=http://127.0.0.1:8801 \
        --requests $requests --out "$output/serve-$model.json" ${OPTIONS:-}
    stop
done

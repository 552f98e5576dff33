# Sourced by points.sh and prune.sh.

budwood=${BUDWOOD:-budwood}

# record FILE BENCHMARK OPTION...: run `budwood bench BENCHMARK` unless the record in FILE is complete.
record() {
    local file=$1 benchmark=$2
    shift 2
    if [ -f "$file" ] && grep -q '"status": "complete"' "$file"; then
        echo "$file is complete"
        return
    fi
    "$budwood" bench "$benchmark" --out "$file" "$@"
}

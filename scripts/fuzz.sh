#!/bin/bash
# Runs every fuzz target for some seconds; ends at the first that finds something.
#
#   scripts/fuzz.sh [SECONDS]
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
# The compiler's coverage flags are not stable; this lets a stable compiler have them.
export RUSTC_BOOTSTRAP=1

for manifest in crates/*/fuzz/Cargo.toml; do
    if [ ! -e "$manifest" ]; then
        echo "fuzz: no fuzz targets" >&2
        exit 1
    fi
    directory=$(dirname "$manifest")
    dictionaries=()
    for dictionary in "$directory"/*.dict; do
        if [ -e "$dictionary" ]; then dictionaries+=("-dict=$dictionary"); fi
    done
    for target in $(cargo fuzz list --fuzz-dir "$directory"); do
        echo "fuzz: $target ($directory), $seconds s" >&2
        cargo fuzz run --fuzz-dir "$directory" "$target" -- \
            -max_total_time="$seconds" -print_final_stats=1 "${dictionaries[@]}"
    done
done

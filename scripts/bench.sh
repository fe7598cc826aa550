#!/bin/bash
# Measures backup and restore against others, in one interleaved run on tmpfs.
# Fails if a bound of docs/limits.md is missed.
#
#   scripts/bench.sh [ROUNDS]      (default and least: 3)
#
# It needs root, 9 GiB of free memory and about five minutes. The table goes to
# stdout, what happens to stderr.
set -euo pipefail
cd "$(dirname "$0")/.."

export HIGHWATER_BENCH_ROUNDS=${1:-3}
exec cargo bench --locked --quiet -p highwater --bench backup

#!/bin/bash
# Measures Highwater against others, in one interleaved run. Fails if a gate of
# docs/limits.md is missed; goals that are missed are only said.
#
#   scripts/bench.sh [PART]...      full convert random latency files scattered
#                                   chain large memory   (default: all of them)
#
# It needs root, 12 GiB of free memory, 6 GiB on a disk and about twenty minutes
# of a machine that has nothing else to do. A Markdown table goes to stdout, what
# happens to stderr, and all numbers to target/bench.json.
#
#   HIGHWATER_BENCH_ROUNDS=5        more rounds than 3
#   HIGHWATER_BENCH_SCALE=0.1       smaller sizes, to try the benchmark itself
#   HIGHWATER_BENCH_DISK=/mnt       a directory on the disk to measure on
#   HIGHWATER_BENCH_RUSTIC=no       do not build rustic if it is not there
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "bench: $*" >&2; }

# No Debian or Ubuntu release has rustic, so it is built once, without what a
# backup does not use: some 15 minutes of processor time.
peers=$PWD/target/peers
rustic_version=0.11.4
install_rustic() {
    command -v rustic >/dev/null && return
    if [ "${HIGHWATER_BENCH_RUSTIC:-yes}" = no ]; then
        say "leaving out rustic"
        return
    fi
    mkdir -p "$peers"
    say "building rustic $rustic_version, once (log: $peers/rustic.log)"
    if ! CARGO_TARGET_DIR=$peers/build timeout 3600 cargo install rustic-rs \
        --version "$rustic_version" --locked --no-default-features \
        --root "$peers" >"$peers/rustic.log" 2>&1; then
        say "leaving out rustic: it cannot be built, or not within an hour (the next run goes on with it)"
        return
    fi
    rm -rf "$peers/build"
}

export PATH=$PATH:$peers/bin
case " ${*:-files} " in
*" files "*) install_rustic ;;
esac

available_kib=$(awk '$1 == "MemAvailable:" {print $2}' /proc/meminfo)
if [ "$available_kib" -lt $((12 << 20)) ]; then
    say "only $((available_kib >> 10)) MiB of memory are free: the disks may not fit in it"
fi

export HIGHWATER_BENCH_PARTS="$*"
exec cargo bench --locked --quiet -p highwater --bench backup

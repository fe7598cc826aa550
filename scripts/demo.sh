#!/bin/bash
# Backs up a real VM, crashes it, backs it up again, restores and compares.
#
#   scripts/demo.sh        (`make demo` installs and builds first)
#
# The story is told in crates/cli/examples/demo/story.rs.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

cargo build --release --locked --quiet --package highwater --bin highwater --example demo
demo=${CARGO_TARGET_DIR:-target}/release/examples/demo

# A libvirtd of its own needs namespaces of its own.
if [ "$(id -u)" -eq 0 ]; then
    exec "$demo"
elif command -v sudo >/dev/null; then
    exec sudo "$demo"
else
    echo "demo: cannot start a private libvirtd: run it as root, or install sudo" >&2
    exit 1
fi

#!/bin/bash
# Installs what is missing to build, test, demonstrate or measure Highwater.
#
#   scripts/setup.sh [--for build|test|demo|bench|fuzz]      (default: test)
#
# For Debian 12 and 13 and Ubuntu 24.04, as root or with sudo. It says one line
# for each thing it installs, nothing when all is there, and asks no questions.
set -euo pipefail
cd "$(dirname "$0")/.."

purpose="test"
while [ $# -gt 0 ]; do
    case $1 in
    --for)
        purpose=${2:-}
        shift
        ;;
    --for=*) purpose=${1#--for=} ;;
    -h | --help)
        sed -n '2,7s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        echo "setup: unknown argument $1" >&2
        exit 2
        ;;
    esac
    shift
done

say() { echo "setup: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

# --- What is needed for what -------------------------------------------------

build=(gcc libc6-dev make git curl ca-certificates)
# What runs VMs. On Debian 12 it comes from backports: QEMU 7.2 of the base
# suite is too old to stand for what people run.
vms=(qemu-system-x86 qemu-utils qemu-guest-agent libvirt-daemon-system libvirt-clients
    libvirt-daemon-driver-qemu)
lab=(bindfs busybox-static e2fsprogs ovmf procps swtpm swtpm-tools util-linux xz-utils zstd)
readers=(libnbd-bin nbdkit nbdkit-plugin-python python3-libnbd python3-venv)
# What reads our manual pages and completions.
shells=(groff-base zsh fish)
# Whose wreckage we are tried with.
wrecks=(virtnbdbackup)
# Other programs we are compared with. Not every release has all of them.
peers=(fio hyperfine strace "${wrecks[@]}" restic borgbackup)

packages=("${build[@]}")
optional=()
case $purpose in
build) ;;
fuzz) packages+=(g++) ;;
test) packages+=("${vms[@]}" "${lab[@]}" "${readers[@]}" "${shells[@]}" "${wrecks[@]}") ;;
demo) packages+=("${vms[@]}" "${lab[@]}" libnbd-bin) ;;
bench)
    packages+=("${vms[@]}" "${lab[@]}" "${readers[@]}")
    optional=("${peers[@]}")
    ;;
*)
    say "--for must be build, test, demo, bench or fuzz"
    exit 2
    ;;
esac

# --- Packages ----------------------------------------------------------------

# Prints those of its arguments that are not installed.
missing() {
    [ $# -eq 0 ] && return
    local installed
    installed=$(dpkg-query -W -f '${db:Status-Abbrev}${Package}\n' "$@" 2>/dev/null |
        sed -n 's/^.i *//p') || true
    printf '%s\n' "$@" | grep -vxF -- "$installed" || true
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "cannot install packages: run it as root, or install sudo"
    fi
}

apt() {
    # shellcheck disable=SC2024 # the log is the caller's, not root's
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        fail "cannot run apt-get $*"
    }
}

codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# Adds the backports suite of the mirror that this machine uses already.
add_backports() {
    local suite mirror key=/usr/share/keyrings/debian-archive-keyring.gpg options=
    suite=$(codename)-backports
    if grep -rqs "$suite" /etc/apt/sources.list /etc/apt/sources.list.d/*.list \
        /etc/apt/sources.list.d/*.sources; then
        return
    fi
    mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null ||
        true)
    if [ -z "$mirror" ]; then
        mirror=$(awk '$1 == "deb" {for (i = 2; i <= NF; i++) if ($i ~ /^[a-z]+:/) {print $i; exit}}' \
            /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true)
    fi
    [ -n "$mirror" ] || fail "cannot add $suite: no mirror found in /etc/apt"
    if [ -e "$key" ]; then options="[signed-by=$key] "; fi
    say "adding $suite to the package sources"
    echo "deb $options$mirror $suite main" |
        as_root tee "/etc/apt/sources.list.d/$suite.list" >/dev/null
}

install_packages() {
    local wanted=("$@") backports=() base=() package
    command -v apt-get >/dev/null ||
        fail "no apt-get here; install by other means: ${wanted[*]}"
    for package in "${wanted[@]}"; do
        if [ "$(codename)" = bookworm ] && printf '%s\n' "${vms[@]}" | grep -qxF "$package"; then
            backports+=("$package")
        else
            base+=("$package")
        fi
    done
    if [ ${#backports[@]} -gt 0 ]; then add_backports; fi
    apt update
    if [ ${#backports[@]} -gt 0 ]; then
        say "installing ${backports[*]} (from backports)"
        apt install --no-install-recommends -t "$(codename)-backports" "${backports[@]}"
    fi
    if [ ${#base[@]} -gt 0 ]; then
        say "installing ${base[*]}"
        apt install --no-install-recommends "${base[@]}"
    fi
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT

mapfile -t absent < <(missing "${packages[@]}")
if [ ${#absent[@]} -gt 0 ]; then install_packages "${absent[@]}"; fi
mapfile -t absent < <(missing "${optional[@]}")
known=()
for package in "${absent[@]}"; do
    if apt-cache show "$package" >/dev/null 2>&1; then
        known+=("$package")
    else
        say "leaving out $package: this release does not have it"
    fi
done
if [ ${#known[@]} -gt 0 ]; then install_packages "${known[@]}"; fi

# --- QEMU 7.2, the oldest that is tried: unpacked beside, never installed -------

unpack_old_qemu() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/highwater-lab package version draft deb
    cache=${HIGHWATER_LAB_CACHE:-$cache}
    [ ! -e "$cache/qemu-7.2" ] || return 0
    version_of() {
        apt-cache madison "$1" 2>/dev/null | awk '$3 ~ /^1:7\.2\+/ {print $3}' |
            sort -V | tail -n 1
    }
    if [ "$(codename)" = bookworm ] && [ -z "$(version_of qemu-system-x86)" ]; then
        apt update
    fi
    if [ -z "$(version_of qemu-system-x86)" ]; then
        [ "$(codename)" != bookworm ] || fail "cannot find QEMU 7.2 in the package sources"
        say "leaving out QEMU 7.2: this release does not have it (make test WITHOUT=qemu_7_2)"
        return 0
    fi
    say "unpacking QEMU 7.2 to $cache"
    mkdir -p "$cache"
    draft=$(mktemp -d "$cache/qemu-7.2.draft-XXXXXX")
    for package in qemu-system-x86 qemu-system-common qemu-system-data; do
        version=$(version_of $package)
        (cd "$draft" && apt-get download -q "$package=$version") >"$log" 2>&1 || {
            tail -n 10 "$log" >&2
            fail "cannot download $package $version"
        }
    done
    for deb in "$draft"/*.deb; do dpkg -x "$deb" "$draft"; done
    rm "$draft"/*.deb
    # It is run with the libraries of this system, so it must find them all.
    LC_ALL=C ldd "$draft/usr/bin/qemu-system-x86_64" | grep 'not found' >"$log" &&
        fail "QEMU 7.2 lacks libraries here: $(tr -s '\n\t ' ' ' <"$log")"
    # Whoever finds it under its name finds it whole; another run may have been faster.
    chmod 755 "$draft"
    mv -T "$draft" "$cache/qemu-7.2" 2>"$log" || rm -rf "$draft"
}

if [ "$purpose" = test ]; then unpack_old_qemu; fi

# --- Rust --------------------------------------------------------------------

PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
rust_wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

if ! command -v cargo >/dev/null; then
    if [ -z "$(apt-cache search --names-only '^rustup$' 2>/dev/null)" ]; then
        fail "no cargo found: install Rust $rust_wanted or newer from https://rustup.rs, then run this again"
    fi
    install_packages rustup
    say "installing the stable Rust toolchain"
    rustup default stable >"$log" 2>&1 || {
        tail -n 5 "$log" >&2
        fail "cannot install a Rust toolchain; \`rustup default stable\` must succeed"
    }
fi
found=$(rustc --version 2>/dev/null | sed -n 's/^rustc \([0-9]*\.[0-9]*\).*/\1/p')
if [ "$(printf '%s\n' "$rust_wanted" "${found:-0}" | sort -V | head -n 1)" != "$rust_wanted" ]; then
    fail "Rust $rust_wanted or newer is needed, found ${found:-none}: run \`rustup update stable\`"
fi

install_cargo_tool() {
    command -v "$1" >/dev/null && return
    say "installing $1 (builds it: some minutes)"
    cargo install --locked "$1" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        fail "cannot install $1"
    }
}

case $purpose in
test | bench) install_cargo_tool cargo-nextest ;;
fuzz) install_cargo_tool cargo-fuzz ;;
esac

# --- Python, for the independent reader of the repository format ---------------

if [ "$purpose" = test ] || [ "$purpose" = bench ]; then
    python=target/py
    modules="argon2-cffi blake3 cryptography lz4 zstandard"
    if [ "$(cat $python/installed 2>/dev/null)" != "$modules" ]; then
        say "installing into $python: $modules"
        rm -rf $python
        # The system's Python: another may come first in PATH and vanish with it.
        /usr/bin/python3 -m venv $python >"$log" 2>&1 || fail "cannot make $python: $(cat "$log")"
        # shellcheck disable=SC2086 # a list of words
        $python/bin/pip install --quiet --disable-pip-version-check $modules >"$log" 2>&1 || {
            tail -n 10 "$log" >&2
            fail "cannot install $modules"
        }
        echo "$modules" >$python/installed
    fi
fi

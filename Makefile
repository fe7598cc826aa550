# The front door. People and CI use the same commands; CONTRIBUTING.md tells more.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup install check test demo bench scale mutants fuzz soak

# A rustup in the home directory need not be in PATH.
export PATH := $(PATH):$(HOME)/.cargo/bin

PROFILE := $(if $(CI),ci,default)

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## install what is missing to build and to test
	@scripts/setup.sh --for test

# DESTDIR is where a package is put together; PREFIX where it will be.
PREFIX ?= /usr/local
ROOT = $(DESTDIR)$(PREFIX)
PROGRAM = target/release/highwater

install: ## build, and install program, manual pages, completions (PREFIX=/usr/local, DESTDIR=)
	@scripts/setup.sh --for build
	cargo build --release --locked --bin highwater
	install -D -m 755 $(PROGRAM) "$(ROOT)/bin/highwater"
	install -d "$(ROOT)/share/man/man1" "$(ROOT)/share/bash-completion/completions" \
		"$(ROOT)/share/zsh/site-functions" "$(ROOT)/share/fish/vendor_completions.d"
	$(PROGRAM) man "$(ROOT)/share/man/man1"
	$(PROGRAM) completions bash > "$(ROOT)/share/bash-completion/completions/highwater"
	$(PROGRAM) completions zsh > "$(ROOT)/share/zsh/site-functions/_highwater"
	$(PROGRAM) completions fish > "$(ROOT)/share/fish/vendor_completions.d/highwater.fish"

check: ## format, lints, the project's own rules, fast tests: in a minute, before each commit
	@scripts/setup.sh --for build
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	cargo xtask tidy
	cargo nextest run --workspace --locked --profile fast
	cargo test --workspace --locked --doc --quiet

# What this machine cannot have is left out by name, and seen in the command:
# QEMU 7.2 is unpacked from packages of Debian 12.
WITHOUT ?=

test: ## all tests, with real QEMU, libvirt and guests (WITHOUT=qemu_7_2 where there is none)
	@scripts/setup.sh --for test
	cargo test --workspace --locked --doc --quiet
	cargo nextest run --workspace --locked --profile $(PROFILE) \
	  $(if $(WITHOUT),-E 'not test(/$(WITHOUT)/)')

demo: ## a guided tour: back up, lose, restore
	@scripts/setup.sh --for demo
	cargo build --release --locked --bin highwater
	scripts/demo.sh

bench: ## measure against others, interleaved (PART="full chain" for some)
	@scripts/setup.sh --for bench
	cargo build --release --locked --bin highwater
	scripts/bench.sh $(PART)

scale: ## a disk of 8 TiB with 200 000 pieces of data there and back: minutes, 6 GiB of memory
	@scripts/setup.sh --for test
	HIGHWATER_SCALE_PIECES=200000 cargo nextest run --release --locked -p highwater --test lab \
	  --no-capture -E 'test(/^scale::/)'

mutants: ## break the program on purpose; its tests must notice (NAME=... for some)
	@scripts/setup.sh --for test
	cargo xtask mutants $(NAME)

# Not SECONDS: that is a variable of bash itself.
FUZZ_SECONDS ?= 60
fuzz: ## feed garbage to every parser, FUZZ_SECONDS=60 each
	@scripts/setup.sh --for fuzz
	scripts/fuzz.sh $(FUZZ_SECONDS)

SOAK_SECONDS ?= 3600
SOAK_SEED ?= $(shell date +%s)
soak: ## random lives of a VM, one seed after the other for SOAK_SECONDS=3600, from SOAK_SEED= on
	@scripts/setup.sh --for test
	HIGHWATER_LIFE_SEED=$(SOAK_SEED) HIGHWATER_LIFE_SECONDS=$(SOAK_SECONDS) cargo nextest run --locked \
	  --profile soak -p highwater --test lab --no-capture -E 'test(/^(bare_)?life::a_life_of_any_seed_/)'

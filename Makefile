# Two commands do everything on a fresh Debian or Ubuntu machine:
#   make demo   the main job end to end, on network namespaces of this machine (KEEP=1 leaves it up, PAUSE=1 steps, CLUSTERS=1: the second part alone)
#   make test   format, lints, unit, property, netns, interop and package suites
# Both install what is missing with apt (asking sudo), build as you, and use root only for network namespaces.
SHELL := /bin/bash
.DEFAULT_GOAL := help
ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E env "PATH=$$PATH")
BINS := -p tombolo -p tombolo-agent -p tombolo-netd -p tombolo-gateway -p tombolo-discovery -p tombolo-testkit -p tombolo-demo

.PHONY: help setup build demo test test-slow fuzz bench bench-wan bench-sessions clean
help:
	@sed -n '2,4s/^# //p' Makefile

setup:
	@./tests/setup.sh

build: setup
	cargo build --locked --release $(BINS)

demo: build
	@$(ROOT) target/release/tombolo-demo $(if $(KEEP),--keep) $(if $(PAUSE),--pause) $(if $(CLUSTERS),--clusters)

test: setup packages-setup
	@$(ROOT) cargo run --locked --quiet --package xtask -- ci

# A VM with a kernel of its own, and `vagrant up`: a quarter of an hour where there is no KVM. Writes what it saw to
# tests/vm/RESULTS.md, which is committed.
test-slow: setup packages-setup
	@./packaging/box/setup.sh --vagrant
	@$(ROOT) env TOMBOLO_VM_RESULTS=$(CURDIR)/tests/vm/RESULTS.md cargo run --locked --quiet --package xtask -- slow

# Each fuzz target under libFuzzer, SECS=60 seconds each.
fuzz:
	@./fuzz/run.sh

bench: setup
	cargo build --locked --release $(BINS)
	@$(ROOT) benches/run.sh

# QUIC, h2 and double HBONE over an emulated way of 50 ms that loses 1 % of 300 Mbit/s; WAN="--rounds 5" for other arguments.
bench-wan: setup
	cargo build --locked --release -p tombolo-bench-wan
	@$(ROOT) benches/wan.sh $(WAN)

# A gateway with 1,000 and 5,000 hosts that hold a session: memory of each, CPU, return after a restart; SESSIONS="--sessions 500".
bench-sessions: setup
	cargo build --locked --release $(BINS) -p tombolo-bench-sessions
	@$(ROOT) benches/sessions.sh $(SESSIONS)

-include packaging/packages.mk

clean:
	cargo clean

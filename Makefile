# What one can do here; `make` alone lists it. The broker is scripts/broker's affair: every
# target that needs one gets a private node on free ports, and leaves none behind.

PREFIX ?= /usr/local
CARGO  ?= cargo
ROOT    = $(DESTDIR)$(PREFIX)

# Where zsh looks for completions; where systemd looks for units (empty: none are installed).
ZSH_FUNCTIONS ?= $(PREFIX)/share/zsh/site-functions
UNITS         ?= $(PREFIX)/lib/systemd/system

CHAOS_SECONDS ?= 60
CHAOS_SEED    ?= 42
FUZZ_SECONDS  ?= 60
ROUNDS        ?= 5
PROVE_SECONDS ?= 600
# Most tests wait, for a broker or a deadline: with more of them at a time than a few cores, those have work.
export RUST_TEST_THREADS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores > 6 ? cores : 6)))

.DEFAULT_GOAL := help
.PHONY: help demo test test-with-broker coverage ten-ways prove chaos fuzz cluster compare scaling lint build install install-built deb deb-test broker clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## see it work: a broker, a server, one call, 832040
	@$(CARGO) build --release --locked
	@scripts/broker with-broker scripts/demo target/release/fibrpc

test: ## every test, against a private broker (or the one that FIBRPC_TEST_URL names)
	@scripts/peers
	scripts/prove 20
	scripts/broker with-broker $(MAKE) --no-print-directory test-with-broker

# What no feature changes is tested once: the corpus of bytes, and all that is generated.
ONE_FEATURE = PROPTEST_CASES=16 $(CARGO) test --locked --no-default-features
EXCEPT      = -- --skip bytes::

test-with-broker: # each feature alone, then everything with all of them
	$(ONE_FEATURE) --lib --test library $(EXCEPT)
	$(ONE_FEATURE) --features tls --lib --test library $(EXCEPT)
	$(ONE_FEATURE) --features json --lib --test library $(EXCEPT)
	$(ONE_FEATURE) --features cli --lib --bins --test library $(EXCEPT)
	$(CARGO) test --locked --all-features

coverage: ## which lines of src/ the tests reach, for each file, from a build of its own
	@scripts/peers
	@scripts/broker with-broker scripts/coverage

ten-ways: ## the runs of docs/ten-ways-it-breaks.md: what breaks the tutorial, and what fibrpc does instead
	@scripts/peers pika
	@$(CARGO) build --locked --bins --examples
	@env -u AMQP_URL -u FIBRPC_TEST_URL scripts/broker with-broker scripts/ten-ways target/debug

prove: ## search schedules of the hand-overs between threads, others each time (PROVE_SECONDS=600)
	PROVE_FROM=$$(date +%s) scripts/prove $(PROVE_SECONDS)

chaos: ## seeded faults under load; a history that is judged (CHAOS_SECONDS=60, CHAOS_SEED=42, CHAOS_HISTORY=FILE)
	CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) scripts/broker with-broker \
		$(CARGO) test --locked --release --test it chaos -- --nocapture

fuzz: ## look for bytes that break the way in, guided by coverage: each target for FUZZ_SECONDS=60
	@FUZZ_SECONDS=$(FUZZ_SECONDS) scripts/fuzz

cluster: ## three RabbitMQ nodes, a quorum queue, a load; its leader is killed ten times
	CLUSTER_KILLS=10 $(CARGO) test --locked --release --test it cluster -- --nocapture

compare: build ## fibrpc beside other libraries in C, Rust, Go, JavaScript, Python; bodies; TLS: medians of ROUNDS=5
	@scripts/peers pika
	@ROUNDS=$(ROUNDS) scripts/broker with-broker target/peers/bin/python bench/compare.py

scaling: build ## rates against calls in flight, threads, workers, prefetch, spinning; draws docs/scaling.svg
	@scripts/peers matplotlib
	@ROUNDS=$(ROUNDS) scripts/broker with-broker target/peers/bin/python bench/scaling.py

lint: ## formatting, who imports whom, clippy, documentation, shell scripts; warnings are errors
	$(CARGO) fmt --check
	scripts/storeys
	$(CARGO) clippy --locked --all-targets --all-features -- -D warnings
	$(CARGO) clippy --locked --no-default-features --all-targets -- -D warnings
	$(CARGO) clippy --locked --no-default-features --features tls --all-targets -- -D warnings
	$(CARGO) clippy --locked --no-default-features --features json --all-targets -- -D warnings
	$(CARGO) clippy --locked --no-default-features --features cli --all-targets -- -D warnings
	RUSTFLAGS="--cfg shuttle" $(CARGO) clippy --locked --no-default-features --lib --profile test \
		--target-dir target/prove -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --all-features --document-private-items
	bash -n scripts/apt.bash scripts/broker scripts/coverage scripts/deb scripts/deb-test scripts/demo scripts/fuzz \
		scripts/peers scripts/prove scripts/prove-faults scripts/storeys scripts/ten-ways .ci/run

build: ## the binary, target/release/fibrpc
	$(CARGO) build --release --locked

install: build ## binary, completions, manual pages and systemd units, under PREFIX (default /usr/local)
	@$(MAKE) --no-print-directory install-built

install-built: # what is built already
	install -D -m 755 target/release/fibrpc "$(ROOT)/bin/fibrpc"
	install -d "$(ROOT)/share/man/man1" "$(ROOT)/share/bash-completion/completions" \
		"$(DESTDIR)$(ZSH_FUNCTIONS)" "$(ROOT)/share/fish/vendor_completions.d"
	target/release/fibrpc man "$(ROOT)/share/man/man1"
	target/release/fibrpc completions bash >"$(ROOT)/share/bash-completion/completions/fibrpc"
	target/release/fibrpc completions zsh >"$(DESTDIR)$(ZSH_FUNCTIONS)/_fibrpc"
	target/release/fibrpc completions fish >"$(ROOT)/share/fish/vendor_completions.d/fibrpc.fish"
ifneq ($(UNITS),)
	install -d "$(DESTDIR)$(UNITS)"
	for unit in contrib/*.service; do \
		sed 's|/usr/local/bin/|$(PREFIX)/bin/|' "$$unit" >"$(DESTDIR)$(UNITS)/$${unit#contrib/}" || exit; \
	done
endif

deb: build ## a Debian package, in target/debian
	scripts/deb

deb-test: deb ## install, run, upgrade and purge it in a container with its own systemd (as root)
	scripts/broker with-broker scripts/deb-test

broker: ## a private broker in the foreground, until Ctrl-C; prints the URL to use
	@scripts/broker run

clean: ## stop what `scripts/broker start` started, and remove what was built
	@scripts/broker stop
	$(CARGO) clean

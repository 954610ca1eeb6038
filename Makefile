# Every target works from a fresh checkout: the scripts install what they need, once (scripts/setup.sh says where
# and how to choose a torch). ARGS go to the command: make quickstart ARGS="seed=1", make test ARGS="-k tree".
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-docs test-faults test-faults-long test-mutations test-gpu test-cluster test-runtimes bench lint wheel clean

help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 18

setup:           ## the environment of a developer, in .venv
	@scripts/setup.sh dev

quickstart:      ## a small base, rows, a head, proof and speed, an export: minutes, no download of models
	@scripts/quickstart.sh $(ARGS)

test:            ## lint and the quick tests
	@scripts/test.sh $(ARGS)

test-slow:       ## the tests marked slow
	@LINT=0 scripts/test.sh -m "slow and not faults" $(ARGS)

test-docs:       ## the tests marked docs: what README.md and docs/ tell a reader to run, minutes
	@LINT=0 scripts/test.sh -m docs --dist load tests/docs $(ARGS)

test-faults:     ## the tests marked faults, the short set: kills, signals, full disks, bad and malicious input, minutes
	@LINT=0 scripts/test.sh -m "faults and not slow" $(ARGS)

# KILLS of each kind; every passing of every crash point. docs/reliability.md records what it said.
test-faults-long: ## all of them, with KILLS=50 of each kind and every passing of every crash point: an hour
	@LINT=0 DRAFTSMITH_KILLS=$(or $(KILLS),50) DRAFTSMITH_POINTS=all scripts/test.sh -s -m faults $(ARGS)

test-mutations:  ## takes each guard of the fault tests away, in a copy, and sees its test fail: minutes
	@scripts/setup.sh dev
	@"$${VENV:-.venv}/bin/python" tests/faults/mutations.py $(ARGS)

test-gpu:        ## the tests marked gpu, one at a time; needs a CUDA torch (TORCH, TORCH_INDEX)
	@LINT=0 EXTRAS=dev,gpu scripts/test.sh -n 0 -m gpu $(ARGS)

# As root it installs what the tests need of Debian, if that is missing; without, they say what they lack.
test-cluster:    ## the tests marked cluster, one at a time: two nodes by network namespaces, Slurm, launchers
	@if [ "$$(id -u)" = 0 ] && ! type ip slurmctld slurmd munged pgrep &>/dev/null && type apt-get &>/dev/null; then \
	    apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2 procps; \
	fi
	@LINT=0 scripts/test.sh -n 0 -m cluster $(ARGS)

test-runtimes:   ## the tests marked runtime: vLLM's own server with our exports, in .venv-runtimes
	@scripts/runtimes.sh $(ARGS)

bench:           ## the published ratios of a training step, beside those recorded: an hour
	@scripts/bench.sh $(ARGS)

lint:            ## ruff, its formatter, mypy
	@scripts/lint.sh

# setuptools copies into build/ and packs what earlier builds left there: it goes first, and last.
wheel:           ## dist/draftsmith-….whl
	@scripts/setup.sh dev
	@rm -rf build dist
	@"$${VENV:-.venv}/bin/python" -m build --wheel --no-isolation
	@rm -rf build

clean:           ## what builds and checks left behind; environments and runs stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find src conf tests -name __pycache__ -type d -prune -exec rm -rf {} +

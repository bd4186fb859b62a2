# Each target works alone on a fresh clone: it sets up what it needs and is quick when that is done already.
# What it sets up: .venv (scripts/set-up-venv) and, for the tests, Debian packages (scripts/need-programs).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Extra arguments, e.g.: make test ARGS='-m t1 -k rename'
ARGS ?=

# What the models are searched with, as package=program or package=/path: gcc's package does not bring the headers along.
MODEL_PROGRAMS := spin=spin gcc=gcc libc6-dev=/usr/include/stdio.h

# Programs that the tests run on a guest's mount, and files that they read.
TEST_PROGRAMS := acl=setfacl attr=getfattr btrfs-progs=mkfs.btrfs e2fsprogs=mkfs.ext4 git=git inotify-tools=inotifywait linux-libc-dev=/usr/include/linux/fuse.h rsync=rsync sqlite3=sqlite3 xfsprogs=mkfs.xfs $(MODEL_PROGRAMS)

# What virtual machines are run with. The tests that need them are skipped where these cannot be had.
VM_PROGRAMS := qemu-system-x86=qemu-system-x86_64 qemu-system-common=/usr/lib/qemu/virtiofsd

# What the user's shell sets for other programs must not reach into .venv, nor keep Python from caching bytecode there.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 32

.PHONY: demo
demo: venv ## set up everything and show two guests on one directory
	@.venv/bin/coherency demo $(ARGS)

.PHONY: test
test: programs virtual-machines lint ## set up everything, lint, and run all tests, the fast ones first
	@scripts/run-tests $(ARGS)

.PHONY: lint
lint: venv ## ruff, and mypy in strict mode
	@.venv/bin/ruff check .
	@.venv/bin/mypy

.PHONY: model
model: venv ## search the models of docs/model in full (ARGS=--quick: those searches that are short)
	@scripts/need-programs $(MODEL_PROGRAMS)
	@.venv/bin/python docs/model/check.py $(ARGS)

.PHONY: bench
bench: venv ## nanoseconds per stat in each mode, and trips to the host
	@.venv/bin/python benchmarks/hit_path.py $(ARGS)

.PHONY: bench-sharing
bench-sharing: venv ## what changes of shared files cost, recalls, and how late guests see them
	@.venv/bin/python benchmarks/sharing.py $(ARGS)

.PHONY: bench-vm
bench-vm: venv virtual-machines ## what virtual machines get from stock virtiofs, and from ours over it
	@.venv/bin/python benchmarks/vm.py $(ARGS)

.PHONY: bench-fuse-libraries
bench-fuse-libraries: venv ## one FUSE request through coherency.fuse, pyfuse3 and mfusepy (installs them under build/)
	@.venv/bin/python benchmarks/fuse_libraries.py $(ARGS)

.PHONY: clean
clean: ## remove everything that the other targets made
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: venv
venv:
	@scripts/set-up-venv

.PHONY: programs
programs:
	@scripts/need-programs $(TEST_PROGRAMS)

.PHONY: virtual-machines
virtual-machines:
	@scripts/set-up-vm $(VM_PROGRAMS) || echo "no virtual machines: the tests that need them will be skipped" >&2

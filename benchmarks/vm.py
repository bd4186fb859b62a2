"""What programs in a virtual machine get from stock virtiofs, and what they get from ours over it.

Two guests with a stock kernel, under software emulation, have one directory of the host: by stock virtiofs in its modes
``none``, ``auto`` and ``always``, and through a daemon, virtiofsd and an agent in the guest in ``access``, ``prompt`` and ``strict``.

* **Operations**, in the first guest: ``stat`` of one file, open, read and close of small files, ``find``, ``git status``,
  on a clone of this repository that nobody changes. Time per operation, and how often virtiofsd was asked.
* **Stale reads**: the second guest changes a file; when its call has returned the first one looks. A look that finds
  the old state is stale. Both use the same mode.

A control port carries one mount at a time: the modes of ours have their turns one after the other, and in each turn all
stock modes are measured again, in the same rounds.

    python benchmarks/vm.py [--rounds N] [--json] [--strict-aims]

Exit codes: 0 measured (missed aims are printed), 1 could not measure, 2 impossible options, 3 an aim was missed and
--strict-aims was given. Needs root, /dev/fuse, and what ``make bench-vm`` sets up.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import vm_guest
from machine import REPOSITORY, CouldNotMeasure, describe, require_fuse
from report import Aim, Document, print_table, run
from rounds import show_progress
from served import Served

sys.path.append(str(REPOSITORY))  # machines are the tests'

from tests.vm import parts
from tests.vm.guest import Guest
from tests.vm.lines import VmError
from tests.vm.machine import FURTHER, Machine, Share

STOCK = ("none", "auto", "always")
OURS = ("strict", "prompt", "access")
ALL = (*STOCK, *reversed(OURS))
STATS_PER_ROUND = 300
FILES_READ = 60
CHANGES = 100
FIND = ("find", ".", "-path", "./.git", "-prune", "-o", "-size", "+1000000k", "-print")  # a size: it must stat
GIT_STATUS = ("git", "-c", "safe.directory=*", "status", "--porcelain")
_TREE, _CHANGED = "tree", "changed"
_SMALL_BYTES = 8192
_GIT_TIMEOUT_S, _PROGRAM_TIMEOUT_S = 60, 100
_LONG_AGO_S = 1_600_000_000


class Bench:
    """A daemon, a clone of this repository in its share, and two machines. A context manager."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def __enter__(self) -> Bench:
        with ExitStack() as undo:
            self.served = undo.enter_context(Served())
            self.share = self.served.share
            show_progress("cloning this repository into the share")
            self.files = clone(self.share / _TREE)
            shares = [Share(mode, self.share, mode) for mode in STOCK]
            show_progress("booting two machines")
            self.guests = [
                undo.enter_context(
                    Guest(name, self.served.directory / name, self.served.runtime_dir, self.share_name, shares)
                )
                for name in ("vm1", "vm2")
            ]
            for guest in self.guests:
                guest.wait_until_ready()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    @property
    def share_name(self) -> str:
        return self.served.export.parent.name

    def mount(self, mode: str) -> None:
        """Ours, in both machines."""
        show_progress(f"mounting in {mode}")
        pending = [guest.start_mount(mode) for guest in self.guests]
        for guest, each in zip(self.guests, pending, strict=True):
            guest.mounted(each, mode)

    def unmount(self) -> None:
        for guest in self.guests:
            guest.end_agent()

    def place(self, mode: str) -> str:
        """Where the share is in a machine, in a mode."""
        return f"/mnt/{mode}" if mode in STOCK else str(self.guests[0].mountpoint)

    def asked(self, mode: str) -> int:
        """How often virtiofsd of that mode has answered the first machine."""
        return self.guests[0].machine.virtiofs_answers(mode if mode in STOCK else FURTHER)


def clone(tree: Path) -> list[str]:
    """This repository, as git has it; returns the paths of its files. Its times are old, so that git believes them."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
        return done.stdout

    git("clone", "--quiet", "--no-hardlinks", str(REPOSITORY), str(tree))
    files = [name for name in git("-C", str(tree), "ls-files", "-z").split("\0") if name]
    for name in files:
        os.utime(tree / name, (_LONG_AGO_S, _LONG_AGO_S))
    git("-C", str(tree), "update-index", "--refresh")
    return files


# --- operations -----------------------------------------------------------------------------------------------------


Measure = Callable[[Machine, str], float]


class Figure(NamedTuple):
    """Of one round: microseconds per operation, what it was in two stock modes in this round, and requests."""

    us: float
    always_us: float
    none_us: float
    asked: float


Figures = dict[str, dict[str, list[Figure]]]
"""By operation and mode, one for each round."""


def operations(bench: Bench) -> dict[str, tuple[Measure, int]]:
    """Title of each operation, what measures one round of it in microseconds per operation, and how many operations those are."""
    small = [name for name in bench.files if (bench.share / _TREE / name).stat().st_size < _SMALL_BYTES][:FILES_READ]
    inside_tree = bench.files[0]
    return {
        "stat": (
            lambda machine, tree: machine.call(vm_guest.stat_us, f"{tree}/{inside_tree}", STATS_PER_ROUND),
            STATS_PER_ROUND,
        ),
        "open+read+close": (
            lambda machine, tree: machine.call(vm_guest.read_us, [f"{tree}/{name}" for name in small]),
            len(small),
        ),
        "find": (
            lambda machine, tree: machine.start_call(vm_guest.program_us, FIND, tree)(_PROGRAM_TIMEOUT_S),
            1,
        ),
        "git status": (
            lambda machine, tree: machine.start_call(vm_guest.program_us, GIT_STATUS, tree)(_PROGRAM_TIMEOUT_S),
            1,
        ),
    }


def measure_operations(bench: Bench, ours: str, rounds: int, found: Figures) -> None:
    """Add to what was found: figures of all rounds, their ratios to stock modes in the same round, and requests."""
    modes = (*STOCK, ours)
    for title, (measure, count) in operations(bench).items():
        turns = rounds if count > 1 else max(1, rounds // 2)  # programs take long
        for number in range(turns + 1):
            show_progress(f"{title}, with {ours}: round {number} of {turns}")
            costs_us, asked = {}, {}
            for mode in modes:
                before = bench.asked(mode)
                costs_us[mode] = measure(bench.guests[0].machine, f"{bench.place(mode)}/{_TREE}")
                asked[mode] = (bench.asked(mode) - before) / count
            if not number:
                continue  # it has fetched what is fetched once
            for mode in modes:
                row = found.setdefault(title, {}).setdefault(mode, [])
                row.append(Figure(costs_us[mode], costs_us["always"], costs_us["none"], asked[mode]))


def summary(found: Figures) -> dict[str, dict[str, dict[str, float]]]:
    return {
        title: {
            mode: {
                "median_us": round(statistics.median(each.us for each in rows[mode]), 1),
                "lowest_us": round(min(each.us for each in rows[mode]), 1),
                "times_always": round(statistics.median(each.us / each.always_us for each in rows[mode]), 2),
                "times_none": round(statistics.median(each.us / each.none_us for each in rows[mode]), 3),
                "virtiofsd_requests": round(statistics.median(each.asked for each in rows[mode]), 2),
            }
            for mode in ALL
        }
        for title, rows in found.items()
    }


# --- stale reads ----------------------------------------------------------------------------------------------------


def stale_reads(bench: Bench, mode: str) -> dict[str, int]:
    """How many looks began after the change was over and found the state before it."""
    show_progress(f"stale reads of {mode}")
    name = f"{_CHANGED}-{mode}"
    (bench.share / name).write_bytes(b"")
    path, (looking, changing) = f"{bench.place(mode)}/{name}", (guest.machine for guest in bench.guests)
    looking.call(vm_guest.mtime_ns, path)
    stale = 0
    for number in range(1, CHANGES + 1):
        changing.call(vm_guest.set_mtime_ns, path, number)
        stale += looking.call(vm_guest.mtime_ns, path) != number
    return {"looks": CHANGES, "stale": stale}


# --- all of it ------------------------------------------------------------------------------------------------------


def measure(rounds: int) -> tuple[Document, list[Aim]]:
    """Everything, as the JSON document, and the aims."""
    require_fuse()
    if reason := parts.why_no_vm():
        raise CouldNotMeasure(reason)
    with Bench() as bench:
        machine = describe(bench.share) | {
            "guests": f"2 x {bench.guests[0].machine.call(os.uname).release}, one processor, 512 MiB, QEMU without KVM",
            "tree": f"{len(bench.files)} files",
        }
        found: Figures = {}
        stale = {mode: stale_reads(bench, mode) for mode in STOCK}
        for ours in OURS:
            bench.mount(ours)
            measure_operations(bench, ours, rounds, found)
            stale[ours] = stale_reads(bench, ours)
            bench.unmount()
        costs = summary(found)
    aims = [
        Aim("stat: strict / stock always", costs["stat"]["strict"]["times_always"], 1.5),
        Aim("stat: strict / stock none", costs["stat"]["strict"]["times_none"], 1 / 8),
        Aim(f"stale reads of strict in {CHANGES}", stale["strict"]["stale"], 0),
        Aim(f"stale reads of access in {CHANGES}", stale["access"]["stale"], 0),
    ]
    document = {
        "machine": machine,
        "rounds": rounds,
        "operations": costs,
        "stale_reads": {mode: stale[mode] for mode in ALL},
    }
    return document, aims


def print_report(document: Document) -> None:
    print(f"{'rounds':24} {document['rounds']} in each turn")
    for title, rows in document["operations"].items():
        print_table(title, rows)
    print_table("stale reads while the other machine changes the file", document["stale_reads"])


if __name__ == "__main__":
    sys.exit(
        run(
            "What virtual machines get from stock virtiofs, and from ours over it.", measure, print_report,
            rounds=5, rounds_are="how often each mode is measured in each turn",
            troubles=(VmError, subprocess.SubprocessError),
        )
    )  # fmt: skip

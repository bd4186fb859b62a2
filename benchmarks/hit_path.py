"""What one ``stat`` costs when nothing has changed, in every mode; and how often the host was asked.

All figures of one run are measured in turns (see ``rounds``), each subject from inside its own directory, so that the
length of the path in front of it does not matter. A block of calls is preceded by some that are not counted. Host trips
are the requests that reached the daemon's export while the block ran.

    python benchmarks/hit_path.py [--rounds N] [--json] [--strict-aims]

Exit codes: 0 measured (missed aims are printed), 1 could not measure, 2 impossible options, 3 an aim was missed and
--strict-aims was given. Needs root and /dev/fuse.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import CouldNotMeasure, describe, require_fuse
from report import Aim, Document, run
from rounds import calls_per_block, interleave, ratio, show_progress, time_calls
from served import Served

MODES = ("none", "access", "always", "prompt", "strict")
NATIVE, AGENT, BESIDE_AGENT = "native", "GuestAgent.stat", "os.stat"
WALKERS = (NATIVE, *MODES, AGENT)
SUBJECTS = (*WALKERS, BESIDE_AGENT)  # the last is the native directory again, as a check of the method
DEPTHS = {1: "f", 4: "a/b/c/f"}
WALK_DIRECTORIES, WALK_FILES = 20, 20
WALK_EVERY = 3  # a walk takes long: one of so many rounds has one
WALK_ENTRIES = WALK_DIRECTORIES * (1 + WALK_FILES)
TABLE_SHARES = (10, 10_000)


@dataclass(frozen=True)
class Subject:
    """Who is asked, and from where."""

    directory: Path
    stat: Callable[[Any], os.stat_result]
    scandir: Callable[[Any], Any]


@dataclass
class Cost:
    """What a subject took, one figure per round, and what it asked of the host in all its calls."""

    nanoseconds: list[float] = field(default_factory=list)
    calls: int = 0
    host_trips: int = 0

    def summary(self, native: Cost) -> dict[str, float]:
        return {
            "median_ns": round(statistics.median(self.nanoseconds)),
            "lowest_ns": round(min(self.nanoseconds)),
            "times_native": round(ratio(self.nanoseconds, native.nanoseconds), 3),
            "host_trips": round(self.host_trips / self.calls, 3),
        }


class Bench:
    """One share with all subjects on it."""

    def __init__(self, served: Served, rounds: int) -> None:
        self._served, self._rounds, self._walks = served, rounds, max(1, rounds // WALK_EVERY)
        for path in DEPTHS.values():
            _write(served.share / path)
        for number in range(self._walks):
            for name in WALKERS:
                for directory in range(WALK_DIRECTORIES):
                    for file in range(WALK_FILES):
                        _write(served.share / f"walk/{number}/{name}/d{directory}/f{file}")
        agent = served.agent()
        native = Subject(served.share, os.stat, os.scandir)
        self._subjects = {NATIVE: native}
        for mode in MODES:
            self._subjects[mode] = Subject(served.mount(mode), os.stat, os.scandir)
        self._subjects[AGENT] = Subject(served.share, agent.stat, agent.scandir)
        self._subjects[BESIDE_AGENT] = native

    def stats(self, depth: int) -> dict[str, Cost]:
        """One and the same file, asked again and again."""
        path, costs = DEPTHS[depth], {name: Cost() for name in SUBJECTS}
        counts = {}
        for name, subject in self._subjects.items():
            with _inside(subject.directory):
                _require_truth(subject.stat(path), self._served.share / path, name)
                counts[name] = calls_per_block(subject.stat, path)

        def measure(name: str) -> Callable[[int], float]:
            subject, count, cost = self._subjects[name], counts[name], costs[name]

            def block(_: int) -> float:
                with _inside(subject.directory):
                    time_calls(subject.stat, path, max(10, count // 20))
                    trips = self._served.host_trips()
                    nanoseconds = time_calls(subject.stat, path, count)
                    cost.host_trips += self._served.host_trips() - trips
                    cost.calls += count
                    return nanoseconds

            return block

        figures = interleave({name: measure(name) for name in SUBJECTS}, self._rounds, f"stat, depth {depth}")
        for name, cost in costs.items():
            cost.nanoseconds = figures[name]
        return costs

    def walks(self) -> tuple[dict[str, Cost], dict[str, Cost]]:
        """A tree that the subject has never seen, walked with a stat of each entry; then once more. Per entry."""
        first, second = ({name: Cost() for name in WALKERS} for _ in range(2))

        def measure(name: str) -> Callable[[int], float]:
            subject = self._subjects[name]

            def block(number: int) -> float:
                nanoseconds = 0.0
                with _inside(subject.directory):
                    for costs in (first, second):
                        trips = self._served.host_trips()
                        nanoseconds = _time_walk(subject, f"walk/{number}/{name}")
                        costs[name].host_trips += self._served.host_trips() - trips
                        costs[name].calls += WALK_ENTRIES
                        costs[name].nanoseconds.append(nanoseconds)
                return nanoseconds

            return block

        interleave({name: measure(name) for name in WALKERS}, self._walks, "walks")
        return first, second


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"contents\n")


@contextmanager
def _inside(directory: Path) -> Iterator[None]:
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir("/")


def _require_truth(found: os.stat_result, file: Path, name: str) -> None:
    truth = os.stat(file)
    if (found.st_ino, found.st_size, found.st_mtime_ns) != (truth.st_ino, truth.st_size, truth.st_mtime_ns):
        raise CouldNotMeasure(f"{name} answers something else than the share: {found} instead of {truth}")


def _walk(subject: Subject, top: str) -> int:
    """Look at everything below ``top``; returns how many entries that were."""
    scandir, todo, entries = subject.scandir, [top], 0
    while todo:
        with scandir(todo.pop()) as listing:
            for entry in listing:
                entries += 1
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
    return entries


def _time_walk(subject: Subject, top: str) -> float:
    """Nanoseconds per entry."""
    start_ns = time.perf_counter_ns()
    entries = _walk(subject, top)
    nanoseconds = time.perf_counter_ns() - start_ns
    if entries != WALK_ENTRIES:
        raise CouldNotMeasure(f"the walk of {subject.directory}/{top} met {entries} entries instead of {WALK_ENTRIES}")
    return nanoseconds / entries


def table_memory(files: int) -> dict[str, int]:
    """What the version table takes after a mount and a ``GuestAgent`` have looked at each of so many files."""
    with Served() as served:
        for number in range(files):
            _write(served.share / f"d{number // 100}/f{number}")
        agent, mountpoint = served.agent(), served.mount("access")
        untouched = served.table_allocated_bytes()
        _walk(Subject(mountpoint, os.stat, os.scandir), str(mountpoint))
        _walk(Subject(served.share, agent.stat, agent.scandir), ".")
        status = served.status()
        return {
            "files": files,
            "table_bytes": int(status["table_bytes"]),
            "allocated_bytes_at_start": untouched,
            "allocated_bytes": served.table_allocated_bytes(),
            "inodes_known_to_the_daemon": int(status["nodes"]),
        }


def aims(stats: dict[int, dict[str, Cost]], second_walk: dict[str, Cost], tables: list[dict[str, int]]) -> list[Aim]:
    """The aims of the project for hits."""
    found = []
    for depth, costs in stats.items():
        for name, reference, limit in (("access", "none", 0.6), ("always", NATIVE, 1.3), (AGENT, BESIDE_AGENT, 1.0)):
            value = ratio(costs[name].nanoseconds, costs[reference].nanoseconds)
            found.append(Aim(f"{name} / {reference}, depth {depth}", round(value, 3), limit))
        value = ratio(costs["strict"].nanoseconds, costs["always"].nanoseconds)
        found.append(Aim(f"strict / always, depth {depth}", round(value, 3), 1.05))
    for name in ("access", "prompt", "strict", AGENT):
        trips = sum(costs[name].host_trips for costs in (*stats.values(), second_walk))
        calls = sum(costs[name].calls for costs in (*stats.values(), second_walk))
        found.append(Aim(f"host trips of {name} in {calls} stats of unchanged inodes", trips, 0))
    few, many = tables
    grown = abs(many["table_bytes"] - few["table_bytes"])
    found.append(Aim(f"bytes by which the table grows from {few['files']} to {many['files']} files", grown, 0))
    text = f"bytes allocated for the table with {many['files']} files"
    found.append(Aim(text, many["allocated_bytes"], few["table_bytes"]))
    return found


def measure(rounds: int) -> tuple[Document, list[Aim]]:
    """Everything, as the JSON document, and the aims."""
    require_fuse()
    show_progress("starting a daemon and five guests, making files")
    with Served() as served:
        machine = describe(served.share)
        bench = Bench(served, rounds)
        stats = {depth: bench.stats(depth) for depth in DEPTHS}
        first, second = bench.walks()
    tables = []
    for files in TABLE_SHARES:
        show_progress(f"memory of the table, {files} files")
        tables.append(table_memory(files))
    found = aims(stats, second, tables)

    def summaries(costs: dict[str, Cost]) -> dict[str, dict[str, float]]:
        return {name: cost.summary(costs[NATIVE]) for name, cost in costs.items()}

    document = {
        "machine": machine,
        "rounds": rounds,
        "stat": {str(depth): summaries(costs) for depth, costs in stats.items()},
        "walk": {
            "rounds": len(first[NATIVE].nanoseconds),
            "entries": WALK_ENTRIES,
            "first": summaries(first),
            "second": summaries(second),
        },
        "table": tables,
    }
    return document, found


def print_report(document: Document) -> None:
    print(f"{'rounds':24} {document['rounds']}, walks {document['walk']['rounds']}")
    for depth, costs in document["stat"].items():
        _print_costs(f"stat of an unchanged file, depth {depth}", "per stat", costs)
    walk = document["walk"]
    _print_costs(f"first walk, {walk['entries']} entries with a stat of each", "per entry", walk["first"])
    _print_costs("second walk", "per entry", walk["second"])
    print("\nmemory of the version table")
    for table in document["table"]:
        print(
            f"  {table['files']:6} files: {table['table_bytes']:,} bytes, of them allocated {table['allocated_bytes']:,}"
            f" ({table['allocated_bytes_at_start']:,} before anybody looked)"
        )


def _print_costs(title: str, unit: str, costs: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    print(f"  {'':18}{'ns ' + unit:>14}{'lowest':>12}{'x native':>12}{'host trips ' + unit:>24}")
    for name, cost in costs.items():
        figures = (
            f"{cost['median_ns']:>14}{cost['lowest_ns']:>12}{cost['times_native']:>12.2f}{cost['host_trips']:>24.2f}"
        )
        print(f"  {name:18}{figures}")


if __name__ == "__main__":
    sys.exit(
        run(
            "Nanoseconds per stat in each mode, and host trips per stat.", measure, print_report,
            rounds=31, rounds_are="how often each subject has its turn",
        )
    )  # fmt: skip

"""What a change costs when guests share what it changes, and how late a guest sees it.

* **Cost of a change** made on the export, with no guest at all, with 16 guests that have nothing of it (unshared), and
  with 1, 4 and 16 guests whose kernels hold what is changed (shared). Each change is timed alone; between two changes
  the sharers look again, untimed, until their kernels hold it. Changes of attributes (chmod), and of a name (rename).
* **Recall to ack**: how long the daemon waited for the one sharer of such a change, as it says itself.
* **Staleness of prompt**: a guest polls, the export is changed; how long after the change has returned does the last
  look begin that still finds the old state. The same for strict, which must have none; and for strict when the change
  is made in the share directly, past the export, where the daemon has to notice it.
* **A writer and a poller**: one guest appends to a file, another polls it: how many of each in a second, in each mode.
* **Re-validation**: a look after the lease's time, and what it asked of the host.

    python benchmarks/sharing.py [--rounds N] [--json] [--strict-aims]

Exit codes: 0 measured (missed aims are printed), 1 could not measure, 2 impossible options, 3 an aim was missed and
--strict-aims was given. Needs root and /dev/fuse.
"""

from __future__ import annotations

import bisect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from machine import CouldNotMeasure, describe, require_fuse
from report import Aim, Document, print_table, run
from rounds import interleave, ratio, show_progress
from served import Served

GUESTS = 16
SHARERS = (1, 4, 16)
CHANGES_PER_ROUND = 20
POLLED_MODES = ("none", "access", "prompt", "strict", "always")
POLLING_S = 2.0
STALENESS_CHANGES = 200
PAUSE_BETWEEN_CHANGES_S = 0.01
SHORT_LEASE_S = 1.0
REVALIDATIONS = 20
_HELD_WITHIN_S = 5.0
_PAST_THE_EXPORT: Final = "strict, past the export"
_NONE, _UNSHARED = "no guest", f"{GUESTS} idle guests, unshared"


# --- the cost of a change -------------------------------------------------------------------------------------------


class Attributes:
    """A change of attributes alone: the mode goes back and forth."""

    title = "chmod"

    def __init__(self, export: Path, name: str) -> None:
        self.name = name
        self._path, self._mode = export / name, 0o644

    def change(self) -> None:
        self._mode ^= 0o004
        os.chmod(self._path, self._mode)


class Name:
    """A change that takes a name away: a file goes back and forth between two names."""

    title = "rename"

    def __init__(self, export: Path, name: str) -> None:
        self.name, self._export, self._other = name, export, f"{name}-renamed"

    def change(self) -> None:
        os.rename(self._export / self.name, self._export / self._other)
        self.name, self._other = self._other, self.name


Kind = type[Attributes] | type[Name]


class Ground:
    """Two daemons: one with all the guests, one with none."""

    def __init__(self, undo: ExitStack) -> None:
        self.lonely = undo.enter_context(Served())
        self.shared = undo.enter_context(Served())
        self.guests = []
        for number in range(GUESTS):
            show_progress(f"starting guest {number + 1} of {GUESTS}")
            self.guests.append(self.shared.mount("strict", f"guest-{number}"))

    def subjects(self, kind: Kind) -> dict[str, Callable[[int], float]]:
        """Title of each case, and what measures a round of it: microseconds per change, the median of the round."""
        subjects = {
            _NONE: self._subject(kind, self.lonely, ()),
            _UNSHARED: self._subject(kind, self.shared, ()),
        }
        for count in SHARERS:
            subjects[f"shared by {count}"] = self._subject(kind, self.shared, self.guests[:count])
        return subjects

    def _subject(self, kind: Kind, served: Served, sharers: Sequence[Path]) -> Callable[[int], float]:
        name = f"{kind.title}-{len(sharers)}"
        (served.share / name).write_bytes(b"x")
        changed = kind(served.export, name)

        def measure(_: int) -> float:
            costs_us = []
            for _change in range(CHANGES_PER_ROUND):
                for guest in sharers:
                    hold(guest / changed.name)
                recalls = served.status()["recalls"] if sharers else 0
                start_ns = time.perf_counter_ns()
                changed.change()
                costs_us.append((time.perf_counter_ns() - start_ns) / 1000)
                if sharers and served.status()["recalls"] - recalls < len(sharers):
                    raise CouldNotMeasure(f"{changed.name} was not held by {len(sharers)} guests when it was changed")
            return statistics.median(costs_us)

        return measure


def hold(path: Path) -> None:
    """Look until the guest's kernel answers by itself: three looks in a row without a request take no time at all."""
    deadline = time.monotonic() + _HELD_WITHIN_S
    quick = 0
    while quick < 3:
        start_ns = time.perf_counter_ns()
        os.stat(path)
        quick = quick + 1 if time.perf_counter_ns() - start_ns < _KERNEL_ALONE_NS else 0
        if time.monotonic() > deadline:
            raise CouldNotMeasure(f"no kernel was ever granted {path}")


_KERNEL_ALONE_NS = 12_000


def change_costs(ground: Ground, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    document = {}
    for kind in (Attributes, Name):
        figures = interleave(ground.subjects(kind), rounds, f"cost of a {kind.title}")
        document[kind.title] = {
            name: {
                "median_us": round(statistics.median(costs), 1),
                "lowest_us": round(min(costs), 1),
                "times_no_guest": round(ratio(costs, figures[_NONE]), 3),
            }
            for name, costs in figures.items()
        }
    return document


def recall_to_ack(ground: Ground, rounds: int) -> dict[str, dict[str, float]]:
    """What the daemon waited for its one sharer, per change."""
    document = {}
    for kind in (Attributes, Name):
        name = f"ack-{kind.title}"
        (ground.shared.share / name).write_bytes(b"x")
        changed = kind(ground.shared.export, name)
        waits_us = []
        for number in range(rounds * CHANGES_PER_ROUND):
            if number % CHANGES_PER_ROUND == 0:
                show_progress(f"recall to ack of a {kind.title}: {number} of {rounds * CHANGES_PER_ROUND}")
            hold(ground.guests[0] / changed.name)
            before_ns = ground.shared.status()["waited_ns"]
            changed.change()
            waits_us.append((ground.shared.status()["waited_ns"] - before_ns) / 1000)
        document[kind.title] = quantiles(waits_us, "us") | {"changes": len(waits_us)}
    return document


def quantiles(figures: Sequence[float], unit: str) -> dict[str, float]:
    ordered = sorted(figures)
    return {
        f"p50_{unit}": round(statistics.median(ordered), 1),
        f"p99_{unit}": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 1),
        f"worst_{unit}": round(ordered[-1], 1),
    }


# --- pollers --------------------------------------------------------------------------------------------------------


class Poller:
    """Another process that polls a file; see ``poller.py``."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("poller.py")), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise CouldNotMeasure(f"the poller of {path} did not start")

    def finish(self) -> dict[str, Any]:
        output, _ = self._process.communicate("")
        found: dict[str, Any] = json.loads(output)
        return found


def staleness(served: Served, mode: str, through: Path) -> dict[str, float]:
    """How long after a change ``through`` the export or the share itself has returned a guest's look may begin and still
    find the state before it.
    """
    name = f"stale-{mode}-{through.name}"
    (served.share / name).write_bytes(b"x")
    changed, guest = through / name, served.mount(mode, name)
    hold(guest / name)
    poller, ended_ns = Poller(guest / name), {}
    for number in range(STALENESS_CHANGES):
        if number % 50 == 0:
            show_progress(f"staleness of {mode}: {number} of {STALENESS_CHANGES}")
        time.sleep(PAUSE_BETWEEN_CHANGES_S)
        os.utime(changed, ns=(number + 1, number + 1))
        ended_ns[number + 1] = time.monotonic_ns()
    deadline = time.monotonic() + _HELD_WITHIN_S
    while os.stat(guest / name).st_mtime_ns < STALENESS_CHANGES and time.monotonic() < deadline:
        time.sleep(PAUSE_BETWEEN_CHANGES_S)
    time.sleep(PAUSE_BETWEEN_CHANGES_S)
    seen = sorted((value, last_old_ns) for value, last_old_ns, _ in poller.finish()["changes"])
    if not seen or seen[-1][0] < STALENESS_CHANGES:
        raise CouldNotMeasure(f"{mode}: the poller did not see the last of {STALENESS_CHANGES} changes")
    late_us = []
    for value, end_ns in ended_ns.items():
        last_old_ns = seen[bisect.bisect_left(seen, (value, 0))][1]  # a state may be over before anybody has seen it
        late_us.append(max(0, last_old_ns - end_ns) / 1000)
    return quantiles(late_us, "us") | {"late": sum(late > 0 for late in late_us), "changes": len(late_us)}


def appending(served: Served, mode: str) -> dict[str, float]:
    """One guest appends, another one polls, as fast as they can."""
    writer, reader = served.mount(mode, f"writer-{mode}"), served.mount(mode, f"reader-{mode}")
    name = f"log-{mode}"
    (served.share / name).write_bytes(b"")
    os.stat(reader / name)
    show_progress(f"appending and polling in {mode}")
    poller, appends = Poller(reader / name), 0
    with open(writer / name, "ab", buffering=0) as file:
        start_ns = time.monotonic_ns()
        while (elapsed_ns := time.monotonic_ns() - start_ns) < POLLING_S * 1e9:
            file.write(b"one more line\n")
            appends += 1
    found = poller.finish()
    return {
        "appends_per_s": round(appends / elapsed_ns * 1e9),
        "looks_per_s": round(found["looks"] / found["elapsed_ns"] * 1e9),
        "changes_seen": len(found["changes"]),
        "reader_missed_bytes": (served.share / name).stat().st_size - os.stat(reader / name).st_size,
    }


def revalidation() -> dict[str, float]:
    """Looks after the lease's time: what they cost, and what they ask of the host."""
    with Served("--lease", str(SHORT_LEASE_S)) as served:
        (served.share / "file").write_bytes(b"x")
        guest = served.mount("strict", "guest")
        hold(guest / "file")
        costs_us, trips = [], 0
        for number in range(REVALIDATIONS):
            show_progress(f"re-validation: {number} of {REVALIDATIONS}")
            time.sleep(SHORT_LEASE_S * 1.2)
            before = served.host_trips()
            start_ns = time.perf_counter_ns()
            os.stat(guest / "file")
            costs_us.append((time.perf_counter_ns() - start_ns) / 1000)
            trips += served.host_trips() - before
        return quantiles(costs_us, "us") | {"looks": REVALIDATIONS, "host_trips": trips}


# --- all of it ------------------------------------------------------------------------------------------------------


def measure(rounds: int) -> tuple[Document, list[Aim]]:
    """Everything, as the JSON document, and the aims."""
    require_fuse()
    with ExitStack() as undo:
        ground = Ground(undo)
        machine = describe(ground.shared.share)
        costs = change_costs(ground, rounds)
        acks = recall_to_ack(ground, rounds)
    with Served() as served:
        late = {mode: staleness(served, mode, served.export) for mode in ("prompt", "strict")}
        late[_PAST_THE_EXPORT] = staleness(served, "strict", served.share)
        polled = {mode: appending(served, mode) for mode in POLLED_MODES}
    revalidated = revalidation()
    found = [
        *(
            Aim(f"{kind}: {_UNSHARED} / {_NONE}", cases[_UNSHARED]["times_no_guest"], 1.2)
            for kind, cases in costs.items()
        ),
        Aim("staleness of prompt, p99, us", late["prompt"]["p99_us"], 1000.0),
        Aim("stale looks of strict", late["strict"]["late"], 0),
        Aim("staleness of strict, changed past the export, p99, us", late[_PAST_THE_EXPORT]["p99_us"], 5000.0),
        Aim(f"host trips of {REVALIDATIONS} re-validations", revalidated["host_trips"], 0),
    ]
    document = {
        "machine": machine,
        "rounds": rounds,
        "changes_per_round": CHANGES_PER_ROUND,
        "change": costs,
        "recall_to_ack": acks,
        "staleness": late,
        "appending": polled,
        "revalidation": revalidated,
    }
    return document, found


def print_report(document: Document) -> None:
    print(f"{'rounds':24} {document['rounds']}, {document['changes_per_round']} changes in each")
    for kind, cases in document["change"].items():
        print_table(f"cost of a {kind} on the export", cases)
    print_table("recall to ack, one sharer", document["recall_to_ack"])
    print_table("how late a polling guest sees a change", document["staleness"])
    print_table(f"one guest appends, another polls, {POLLING_S:.0f} s", document["appending"])
    print_table("a look after the lease's time", {"strict": document["revalidation"]})


if __name__ == "__main__":
    sys.exit(
        run(
            "What changes of shared files cost, and how late guests see them.", measure, print_report,
            rounds=11, rounds_are="how often each case has its turn",
        )
    )  # fmt: skip

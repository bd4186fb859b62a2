"""``coherency simulate`` with real guests: what is coherent passes, and what is not is found."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from coherency.cli import main
from coherency.sim.faults import FAULTS, GROUPS, fault_sequence
from coherency.sim.history import Call
from tests.mounts import coherency_mounts_below

DEADLINE_S = 90
MIXED_SEED = 287


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    """Its temporary files are to lie in ``directory``."""
    return subprocess.Popen(
        [sys.executable, "-m", "coherency", "simulate", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(directory)},
    )  # fmt: skip


def simulate(directory: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    with start(directory, *options, "--json") as process:
        output, errors = process.communicate(timeout=DEADLINE_S)
    require_nothing_left(directory)
    return process.returncode, json.loads(output) if output else {}, errors


def why(report: dict[str, Any], errors: str) -> str:
    """For the reader of a failure: all of the first violation."""
    for violation in report.get("violations", ())[:1]:
        return "\n".join([violation["where"], violation["reason"], *map(str, violation["calls"]), errors])
    return errors


def require_nothing_left(directory: Path) -> None:
    assert list(directory.iterdir()) == []
    assert coherency_mounts_below([directory.resolve()]) == []
    assert processes_of(directory) == []


def processes_of(directory: Path) -> list[str]:
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue  # it has ended
        if f"{directory}/" in words:
            found.append(words)
    return found


def test_access_is_linearizable(socket_dir: Path) -> None:
    code, report, errors = simulate(socket_dir, "--seconds", "2", "--seed", "1", "--cache", "access")
    assert code == 0, why(report, errors)
    assert report["promise"] == "linearizable"
    assert report["staleness"]["stale"] == report["disturbed"] == 0
    assert report["reads"] > report["writes"] > 50


def test_access_stays_so_when_things_break(socket_dir: Path) -> None:
    code, report, errors = simulate(
        socket_dir, "--seconds", "7", "--seed", "5", "--cache", "access", "--faults", "kill-agent,stop-agent,kill-daemon"
    )
    assert code == 0, why(report, errors)
    assert report["faults"]
    assert report["staleness"]["stale"] == 0


def test_control_without_bumps_a_stale_read_is_found_within_seconds(socket_dir: Path) -> None:
    code, report, _ = simulate(socket_dir, "--seconds", "4", "--seed", "1", "--cache", "access", "--live-dangerously", "no-bumps")
    assert code == 1
    assert report["staleness"]["stale"] > 0
    stale = [each for each in report["violations"] if "overwritten" in each["reason"]]
    assert 2 <= len(stale[0]["calls"]) <= 4, "the shortest history"
    assert set(stale[0]["calls"][0]) == set(Call._fields)


def test_strict_is_linearizable(socket_dir: Path) -> None:
    code, report, errors = simulate(socket_dir, "--seconds", "3", "--seed", "1", "--cache", "strict")
    assert code == 0, why(report, errors)
    assert report["staleness"]["stale"] == report["disturbed"] == 0
    assert report["reads"] > report["writes"] > 50
    assert report["raced"] > 20


def test_strict_stays_so_when_everything_breaks(socket_dir: Path) -> None:
    """The short form of a minute with all faults. The seed: one of each group of faults comes first."""
    code, report, errors = simulate(
        socket_dir, "--seconds", "10", "--seed", str(MIXED_SEED), "--cache", "strict", "--faults", "all", "--lease", "1"
    )
    assert code == 0, why(report, errors)
    assert len(report["faults"]) >= 2
    assert report["staleness"]["stale"] == 0


def test_all_faults_come_early() -> None:
    first = [fault.kind for fault in islice(fault_sequence(Random(f"{MIXED_SEED}/faults"), tuple(FAULTS), 2, 10**9), 5)]
    assert {group for group, kinds in GROUPS.items() if not set(kinds).isdisjoint(first)} == set(GROUPS)


def test_strict_in_one_directory_nobody_waits(socket_dir: Path) -> None:
    code, report, errors = simulate(
        socket_dir, "--seconds", "3", "--seed", "1", "--cache", "strict", "--workload", "same-directory"
    )
    assert code == 0, why(report, errors)
    assert {"create", "rename", "unlink"} <= set(report["longest"])
    assert report["writes"] > 50


def test_control_notifications_that_take_the_lock_of_the_directory_hang(socket_dir: Path) -> None:
    """Each guest waits for the other's ack, in a call that holds what the other needs for its ack."""
    code, report, _ = simulate(
        socket_dir, "--seconds", "2", "--seed", "1", "--cache", "strict", "--workload", "same-directory", "--lease", "0.5",
        "--live-dangerously", "inval-entry",
    )  # fmt: skip
    assert code == 1
    assert {word for each in report["violations"] for word in ("does not return", "took") if word in each["reason"]}


@pytest.mark.parametrize("danger", ["no-recalls", "ack-first", "no-self-recall"])
def test_control_stale_reads_of_a_careless_strict_are_found_within_seconds(danger: str, make_socket_dir: Callable[[], Path]) -> None:
    """Stale reads are found by chance: that may take more than one look."""
    for seed in range(4):
        directory = make_socket_dir()
        code, report, _ = simulate(
            directory, "--seconds", "4", "--seed", str(seed), "--cache", "strict", "--live-dangerously", danger
        )
        if report["staleness"]["stale"]:
            assert code == 1
            return
    raise AssertionError("nothing was found")


def test_prompt_is_stale_for_a_moment_at_most(socket_dir: Path) -> None:
    code, report, errors = simulate(socket_dir, "--seconds", "2", "--seed", "3", "--cache", "prompt")
    assert code == 0, why(report, errors)
    assert report["promise"] == "never older than the bound"


def test_auto_is_stale_within_its_bound(socket_dir: Path) -> None:
    code, report, errors = simulate(socket_dir, "--seconds", "3", "--seed", "2", "--cache", "auto")
    assert code == 0, why(report, errors)
    assert report["staleness"]["stale"] > 0
    assert report["staleness"]["max_ns"] > 10_000_000


def test_always_only_counts(socket_dir: Path) -> None:
    code, report, _ = simulate(socket_dir, "--seconds", "2", "--seed", "2", "--cache", "always")
    assert (code, report["violations"]) == (0, [])
    assert report["staleness"]["stale"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(socket_dir: Path, number: int) -> None:
    with start(socket_dir, "--seconds", "600", "--faults", "all") as process:
        deadline = time.monotonic() + DEADLINE_S
        while not list(socket_dir.glob("coherency-sim-*/worker3.current")):
            assert time.monotonic() < deadline, "did not start"
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    require_nothing_left(socket_dir)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--faults", "earthquake"], "kill-agent"),
        (["--faults", "all,kill-agent"], "stands alone"),
        (["--guests", "0"], "--guests"),
        (["--seconds", "0"], "--seconds"),
        (["--cache", "sometimes"], "access"),
        (["--lease", "0.1"], "--lease"),
        (["--lease", "inf"], "--lease"),
        (["--workload", "idle"], "same-directory"),
        (["--live-dangerously", "carelessly"], "no-bumps"),
    ],
)
def test_impossible_options(options: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["simulate", *options])
    assert result.exit_code == 2
    assert says in result.output

"""``coherency simulate`` with real guests: what is coherent passes, and what is not is found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coherency.cli import main
from coherency.sim.history import Call
from tests.mounts import coherency_mounts_below

DEADLINE_S = 90


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
    code, report, errors = simulate(socket_dir, "--seconds", "2", "--seed", "1")
    assert code == 0, (report["violations"][:2], errors)
    assert report["promise"] == "linearizable"
    assert report["staleness"]["stale"] == report["disturbed"] == 0
    assert report["reads"] > report["writes"] > 50


def test_access_stays_so_when_things_break(socket_dir: Path) -> None:
    code, report, errors = simulate(socket_dir, "--seconds", "7", "--seed", "5", "--faults", "kill-agent,stop-agent,kill-daemon")
    assert code == 0, (report["violations"][:2], errors)
    assert report["faults"]
    assert report["staleness"]["stale"] == 0


def test_control_without_bumps_a_stale_read_is_found_within_seconds(socket_dir: Path) -> None:
    code, report, _ = simulate(socket_dir, "--seconds", "6", "--seed", "1", "--live-dangerously", "no-bumps")
    assert code == 1
    assert report["staleness"]["stale"] > 0
    stale = [each for each in report["violations"] if "overwritten" in each["reason"]]
    assert 2 <= len(stale[0]["calls"]) <= 4, "the shortest history"
    assert set(stale[0]["calls"][0]) == set(Call._fields)


def test_auto_is_stale_within_its_bound(socket_dir: Path) -> None:
    code, report, _ = simulate(socket_dir, "--seconds", "3", "--seed", "2", "--cache", "auto")
    assert code == 0, report["violations"][:2]
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

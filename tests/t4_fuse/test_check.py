"""``coherency check``: nothing is late between coherent mounts, and what is late between others is found."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coherency.cli import main
from coherency.errors import UsageError
from coherency.sim import litmus
from coherency.sim.litmus import TRIALS, Litmus
from tests.guests import Host


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


def check(*directories: Path, seconds: float = 0.5, bound: float = 2.0) -> tuple[int, dict[str, Any], str]:
    run = subprocess.run(
        [sys.executable, "-m", "coherency", "check", *map(str, directories), "--json",
         f"--seconds={seconds}", f"--bound={bound}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return run.returncode, json.loads(run.stdout) if run.stdout else {}, run.stderr


def left_behind(host: Host) -> list[str]:
    return [name for name in os.listdir(host.share) if "check" in name]


def test_access_is_never_late(host: Host) -> None:
    code, report, errors = check(host.mount("x1"), host.mount("x2"), host.export)
    assert (code, report["late"]) == (0, 0), (report, errors)
    assert set(report["operations"]) == {trial.name for trial in TRIALS}
    assert all(each["looks"] >= 6 and not each["unsupported"] for each in report["operations"].values())
    assert left_behind(host) == []


def test_strict_is_never_late(host: Host) -> None:
    code, report, errors = check(host.mount("s1", "strict"), host.mount("s2", "strict"))
    assert (code, report["late"]) == (0, 0), (report, errors)


def test_auto_is_late(host: Host) -> None:
    code, report, _ = check(host.mount("t1", "auto", "--timeout", "0.3"), host.mount("t2", "auto", "--timeout", "0.3"))
    assert code == 1
    for name in ("chmod", "truncate", "mtime", "unlink", "rename"):
        assert report["operations"][name]["late"] > 0, name
        assert report["operations"][name]["never"] == 0, name
        assert 0 < report["operations"][name]["max_ms"] < 2000, name
    assert left_behind(host) == []


def test_always_never_comes(host: Host) -> None:
    code, report, _ = check(host.mount("l1", "always"), host.mount("l2", "always"), bound=0.5)
    assert code == 1
    assert report["operations"]["chmod"]["never"] == report["operations"]["chmod"]["looks"] > 0
    assert left_behind(host) == []


@pytest.fixture
def bind_mount(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    directory, bound = tmp_path / "directory", tmp_path / "bound"
    directory.mkdir()
    bound.mkdir()
    subprocess.run(["mount", "--bind", directory, bound], check=True)
    try:
        yield directory, bound
    finally:
        subprocess.run(["umount", bound], check=True)


def test_bind_mounts_are_never_late(bind_mount: tuple[Path, Path]) -> None:
    code, report, errors = check(*bind_mount)
    assert (code, report["late"]) == (0, 0), (report, errors)
    assert os.listdir(bind_mount[0]) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_shows_what_it_has_found(bind_mount: tuple[Path, Path], number: int) -> None:
    command = [sys.executable, "-m", "coherency", "check", *map(str, bind_mount), "--seconds=600", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "round 3" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    report = json.loads(output)
    assert (process.returncode, report["interrupted"], report["late"]) == (0, True, 0), errors
    assert report["rounds"] >= 2
    assert report["operations"]["chmod"]["looks"] >= 2
    assert os.listdir(bind_mount[0]) == []


def test_what_a_file_system_does_not_offer_is_left_out(bind_mount: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    trials = tuple(trial._replace(change=refuse) if trial.name == "xattr" else trial for trial in TRIALS)
    monkeypatch.setattr(litmus, "TRIALS", trials)
    check = Litmus(bind_mount, bound_s=0.1)
    check.run(0, lambda text: None)
    assert [name for name, tally in check.tallies.items() if tally.unsupported] == ["xattr"]
    assert check.tallies["xattr removed"].looks == 2


def test_other_trees_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="not the same tree"):
        Litmus([tmp_path / "a", tmp_path / "b"], bound_s=0.1).run(0, lambda text: None)
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b") == []


def test_wrong_usage(tmp_path: Path) -> None:
    for directories, says in [
        ([tmp_path], "two or more"), ([tmp_path, tmp_path], "given twice"), ([tmp_path, tmp_path / "no"], "does not exist"),
    ]:  # fmt: skip
        result = CliRunner().invoke(main, ["check", *map(str, directories)])
        assert result.exit_code == 2
        assert says in result.output

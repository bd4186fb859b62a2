"""The command line with real daemons and mounts: starting, stopping, what cannot be, status, invalidate, demo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coherency.shm_memory import map_read_only
from coherency.shm_table import TableReader
from tests.guests import ROOT, Host, Program
from tests.mounts import coherency_mounts_below
from tests.waiting import until

DEADLINE_S = 60.0
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


@pytest.fixture
def guest(host: Host) -> Iterator[Path]:
    yield host.mount("guest")
    assert host.guests.pop("guest").stop() == 0


def coherency(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coherency", *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, timeout=DEADLINE_S,
    )  # fmt: skip


def mount_points(directory: Path) -> list[Path]:
    return [mount.mountpoint for mount in coherency_mounts_below([directory])]


def rest_of_output(program: Program) -> bytes:
    assert program.process.stdout is not None
    return program.process.stdout.read()


# ---- starting and stopping ----


@pytest.mark.parametrize("number", SIGNALS)
def test_one_line_when_ready_and_a_signal_ends_it(socket_dir: Path, number: signal.Signals) -> None:
    host = Host(socket_dir)
    host.serve()
    guest = host.mount("guest")
    agent = host.guests["guest"]
    assert host.daemon.ready_line == f"serving {host.share} as 'test': guests use {host.export}\n"
    assert agent.ready_line == f"mounted 'test' on {guest} (access)\n"
    assert set(mount_points(socket_dir)) == {host.export, guest}
    for program in (agent, host.daemon):
        program.process.send_signal(number)
        assert rest_of_output(program) == b""
        assert program.stop(number) == 0
        assert program.logged() == ""
    assert mount_points(socket_dir) == []
    assert list(host.runtime_dir.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_it_also_while_it_is_in_use(socket_dir: Path, number: signal.Signals) -> None:
    """A file open for reading, one for writing, a working directory, and a process that keeps asking."""
    (socket_dir / "share/directory").mkdir(parents=True)
    with Host(socket_dir) as host:
        guest = host.mount("guest")
        with (
            subprocess.Popen(["cat"], cwd=guest / "directory", stdin=subprocess.PIPE) as user,
            subprocess.Popen(
                ["sh", "-c", 'exec 3>"$1/file"; echo kept >&3; while stat "$1/file"; do :; done', "sh", guest],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ) as busy,
        ):  # fmt: skip
            deadline = time.monotonic() + DEADLINE_S
            while not (host.share / "file").exists() or not (host.share / "file").read_text():
                assert time.monotonic() < deadline
            assert host.guests["guest"].stop(number) == 0
            assert mount_points(socket_dir) == [host.export]
            busy.wait(DEADLINE_S)
            assert user.poll() is None
            assert user.stdin is not None
            user.stdin.close()
        assert (host.share / "file").read_text() == "kept\n"

        # And the daemon, while a guest uses its export.
        guest = host.mount("guest")
        open_file = os.open(guest / "file", os.O_RDONLY)
        with subprocess.Popen(["cat"], cwd=guest, stdin=subprocess.PIPE) as user:
            assert host.daemon.stop(number) == 0
            assert mount_points(socket_dir) == [guest]
            with pytest.raises(OSError, match=str(guest)):
                os.stat(guest / "file")
            assert user.stdin is not None
            user.stdin.close()
        with contextlib.suppress(OSError):  # its file system is gone
            os.close(open_file)
        assert host.guests["guest"].stop(number) == 0
        assert mount_points(socket_dir) == []


def test_unmounted_by_somebody_else(socket_dir: Path) -> None:
    with Host(socket_dir) as host:
        guest = host.mount("guest")
        for program, place in ((host.guests["guest"], guest), (host.daemon, host.export)):
            subprocess.run(["umount", "-l", place], check=True)
            assert program.process.wait(DEADLINE_S) == 1
            assert program.logged() == "coherency: somebody else has unmounted it: stopped\n"


def test_runtime_directory_from_the_environment_relative_and_too_long_for_a_socket(socket_dir: Path) -> None:
    directory = socket_dir / ("long " * 25).strip() / "run"
    share, point = socket_dir / "share", socket_dir / "point"
    share.mkdir()
    point.mkdir()
    here = os.path.relpath(directory)
    with contextlib.ExitStack() as undo:
        serve = Program(socket_dir / "log", "serve", os.path.relpath(share), "--name", "n", COHERENCY_RUNTIME_DIR=here)
        undo.callback(serve.stop)
        mount = Program(socket_dir / "log", "mount", "n", os.path.relpath(point), COHERENCY_RUNTIME_DIR=here)
        undo.callback(mount.stop)
        (point / "file").touch()
        assert (share / "file").exists()
        (report,) = json.loads(coherency("status", "--json", "--runtime-dir", directory).stdout)
        assert report["share"] == str(share)
        assert os.path.samefile(report["export"], directory / "n/export")
        assert mount.stop() == 0
        assert serve.stop() == 0
    assert list(directory.iterdir()) == []


# ---- mount points ----


def test_mount_points_of_every_kind(host: Host) -> None:
    (host.directory / "full/of").mkdir(parents=True)
    names = ["full", "with space\tand tab", os.fsdecode(b"not utf-8 \xff"), "target"]
    (host.directory / "by link").symlink_to("target")
    for name in names:
        (host.directory / name).mkdir(exist_ok=True)
        (host.export / name).touch()
    for name in [*names, "by link"]:
        place = host.directory / name
        program = Program(host.directory / "log", "mount", host.name, place, "--runtime-dir", host.runtime_dir)
        assert set(os.listdir(place)) >= set(names), "what was there is hidden"
        assert program.stop() == 0
        assert mount_points(host.directory) == [host.export]
    assert os.listdir(host.directory / "full") == ["of"]


def test_killed_behind_a_symlink(host: Host) -> None:
    (host.directory / "behind").mkdir()
    (host.directory / "link").symlink_to("behind")
    host.mount("link")
    host.guests["link"].kill()
    host.mount("link")
    assert mount_points(host.directory) == [host.export, host.directory / "behind"]
    assert host.guests.pop("link").stop() == 0


def test_mount_points_that_cannot_be(host: Host, guest: Path) -> None:
    (host.share / "below").mkdir()
    (host.directory / "to the share").symlink_to(host.share / "below")
    (host.directory / "to the runtime directory").symlink_to(host.runtime_dir)
    contains = "the mount would contain itself; choose another mount point"
    hides = "which the mount would hide; choose another mount point"
    mounted = "is a mount of ours already: choose another mount point"
    cases = [
        (host.share / "below", host.runtime_dir, 2, contains),
        (host.directory / "to the share", host.runtime_dir, 2, contains),
        (host.export / "below", host.runtime_dir, 2, contains),
        (host.export / "below", host.directory / "to the runtime directory", 2, contains),
        (host.runtime_dir, host.runtime_dir, 2, hides),
        (host.export, host.runtime_dir, 1, mounted),
        (guest, host.runtime_dir, 1, mounted),
    ]
    with ThreadPoolExecutor() as pool:
        commands = [("mount", host.name, place, "--runtime-dir", runtime_dir) for place, runtime_dir, _, _ in cases]
        answers = list(pool.map(lambda arguments: coherency(*arguments), commands))
    for (_, _, code, message), done in zip(cases, answers, strict=True):
        assert (done.returncode, done.stdout) == (code, ""), done
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert set(mount_points(host.directory)) == {host.export, guest}
    (guest / "still").touch()


def test_another_directory_under_the_same_name(socket_dir: Path) -> None:
    """A guest of the old one answers with errors, and never with a mixture; when the old one is back, so is the guest."""
    with Host(socket_dir) as host:
        (host.export / "file").write_text("the first")
        guest = host.mount("guest")
        assert (guest / "file").read_text() == "the first"
        first = host.share
        host.share = host.directory / "second"
        host.share.mkdir()
        (host.share / "file").write_text("the second")
        host.daemon.stop()
        host.serve()
        log = host.guests["guest"]
        wait_for(lambda: "another directory is served under this name now" in log.logged())
        for _ in range(3):
            with pytest.raises(OSError, match="file"):
                (guest / "file").read_text()
        host.daemon.stop()
        host.share = first
        host.serve()
        wait_for(lambda: os.path.exists(guest / "file"))
        assert (guest / "file").read_text() == "the first"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- status and invalidate ----


def test_status(host: Host, guest: Path) -> None:
    runtime_dir = ("--runtime-dir", host.runtime_dir)
    (guest / "file").touch()
    for _ in range(3):
        (guest / "file").stat()
    done = coherency("status", host.name, "--json", *runtime_dir)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    (shown,) = report["guests"]
    assert (report["name"], report["pid"], report["bumping"]) == (host.name, host.daemon.process.pid, "on")
    assert report["bumps"] > 0
    assert report["epoch"] >= 1
    assert report["table_bytes"] > report["slot_count"] * 8 == 8 << 20
    assert (shown["name"], shown["pid"], shown["mode"]) == ("guest", host.guests["guest"].process.pid, "access")
    assert shown["hits"] > 0
    assert shown["misses"] > 0
    assert shown["refreshes"] >= 0
    assert json.loads(coherency("status", "--json", *runtime_dir).stdout)[0]["pid"] == report["pid"]

    (host.export / "file").chmod(0o600)
    (guest / "file").stat()
    refreshed = json.loads(coherency("status", host.name, "--json", *runtime_dir).stdout)
    assert refreshed["bumps"] > report["bumps"]
    assert refreshed["guests"][0]["refreshes"] > shown["refreshes"]

    for arguments in (["status"], ["status", host.name]):
        text = coherency(*arguments, *runtime_dir).stdout
        assert re.match(rf"{host.name}  {host.share} → {host.export}\n", text)
        assert f"pid {report['pid']}, " in text
        assert re.search(r"epoch \d+, \d+ bumps, .* table 16384 KiB \(memfd, 1048576 slots\)", text), text
        heading, row = text.splitlines()[-2:]
        assert heading.split() == ["guest", "in", "pid", "cache", "hits", "misses", "refreshes", "host", "trips", "entries"]
        assert row.split()[:4] == ["guest", "local", str(shown["pid"]), "access"]


def test_status_without_guests(host: Host) -> None:
    done = coherency("status", host.name, "--runtime-dir", host.runtime_dir)
    assert done.stdout.endswith("\n  no guests\n")
    (report,) = json.loads(coherency("status", "--json", "--runtime-dir", host.runtime_dir).stdout)
    assert report["guests"] == []


def test_status_of_several_and_of_what_is_left_of_a_killed_one(host: Host) -> None:
    (host.directory / "second").mkdir()
    second = Program(
        host.directory / "second.log", "serve", host.directory / "second", "--name", "another", "--runtime-dir", host.runtime_dir,
        "--live-dangerously", "no-bumps",
    )  # fmt: skip
    reports = json.loads(coherency("status", "--json", "--runtime-dir", host.runtime_dir).stdout)
    assert [(report["name"], report["bumping"]) for report in reports] == [("another", "off"), ("test", "on")]
    assert "bumps are switched off: guests are stale" in coherency("status", "--runtime-dir", host.runtime_dir).stdout
    second.kill()
    done = coherency("status", "--json", "--runtime-dir", host.runtime_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert [report["name"] for report in json.loads(done.stdout)] == ["test"]
    done = coherency("status", "another", "--runtime-dir", host.runtime_dir)
    assert (done.returncode, done.stderr) == (
        1, "coherency: no daemon serves 'another' (nobody is listening); start it with: coherency serve SHARE --name another\n"
    )  # fmt: skip
    subprocess.run(["umount", "-l", host.runtime_dir / "another/export"], check=True)


@pytest.fixture
def unwatched(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir(), "--no-watch") as host:
        yield host


def test_invalidate_makes_guests_fetch_what_the_host_has_changed(unwatched: Host) -> None:
    host, guest = unwatched, unwatched.mount("guest")
    for name in ("one", "two"):
        (guest / name).write_text("by the guest")
    for name in ("one", "two"):
        (guest / name).stat()
    epoch, trips = host.status()["epoch"], host.host_trips()
    (host.share / "one").write_text("by the host, behind the export")
    assert (guest / "one").stat().st_size == len("by the guest"), "nobody has told: that is what invalidate is for"
    assert host.host_trips() == trips

    done = coherency("invalidate", host.name, "--runtime-dir", host.runtime_dir)
    assert (done.returncode, done.stdout) == (0, f"'{host.name}' is in epoch {epoch + 1} now\n")
    assert host.status()["epoch"] == epoch + 1
    assert (guest / "one").read_text() == "by the host, behind the export"
    assert (guest / "two").stat().st_size == len("by the guest")
    assert host.host_trips() > trips
    done = coherency("invalidate", host.name, "--json", "--runtime-dir", host.runtime_dir)
    assert json.loads(done.stdout) == {"name": host.name, "epoch": epoch + 2}


@pytest.mark.parametrize("kind", ["memfd", "posix"])
def test_the_table_can_be_opened_by_its_link(socket_dir: Path, kind: str) -> None:
    name = f"cli-{os.getpid()}"
    with Host(socket_dir, "--table", kind, "--slots", "4096", name=name) as host, host.agent() as agent:
        table = host.runtime_dir / name / "table"
        assert table.is_symlink()
        assert kind == "memfd" or os.readlink(table) == f"/dev/shm/coherency-{name}"
        fd = os.open(table, os.O_RDONLY)
        try:
            assert stat.S_IMODE(os.fstat(fd).st_mode) & 0o222 == 0 or kind == "memfd"
            reader = TableReader(map_read_only(fd, None).words)
        finally:
            os.close(fd)
        report = host.status()
        assert (reader.slot_count, reader.table_bytes, report["table_kind"]) == (4096, report["table_bytes"], kind)
        (host.export / "file").touch()
        inode = agent.stat("file").st_ino
        stamp = reader.sample(inode)  # type: ignore[arg-type]
        assert stamp is not None
        assert reader.valid(stamp)
        (host.export / "file").chmod(0o600)
        assert not reader.valid(stamp)
    assert not Path(f"/dev/shm/coherency-{name}").exists()


def test_a_posix_table_in_use_is_not_taken_from_its_daemon(socket_dir: Path) -> None:
    """The lock on a name lies in the runtime directory, and the object is the whole machine's."""
    name = f"twice-{os.getpid()}"
    with Host(socket_dir, "--table", "posix", name=name) as host, host.agent() as agent:
        (host.export / "file").write_text("x")
        assert agent.stat("file").st_size == 1
        before = host.status()
        (socket_dir / "other share").mkdir()
        elsewhere = ("--name", name, "--table", "posix", "--runtime-dir", socket_dir / "else")
        for slots in ((), ("--slots", "4")):  # another size would have to be unlinked, not adopted
            done = coherency("serve", socket_dir / "other share", *elsewhere, *slots)
            assert done.returncode == 2
            assert f"another daemon serves from the table of '{name}'" in done.stderr
        assert list((socket_dir / "else").iterdir()) == []
        assert host.status()["epoch"] == before["epoch"]
        (host.export / "file").write_text("xx")
        assert agent.stat("file").st_size == 2


# ---- virtual machines, and evictions ----


def test_the_options_of_a_virtual_machine_are_those_of_the_daemon(socket_dir: Path) -> None:
    name = f"vm-args-{os.getpid()}"
    with Host(socket_dir, "--table", "posix", "--slots", "1024", name=name) as host:
        directory = host.runtime_dir / name
        asked = ("vm-args", name, "--guest", "vm1", "--runtime-dir", host.runtime_dir)
        printed = coherency(*asked)
        assert (printed.returncode, printed.stderr) == (0, "")
        words = [word for line in printed.stdout.splitlines() if not line.startswith("#") for word in shlex.split(line)]
        document = json.loads(coherency(*asked, "--json").stdout)
        assert document["qemu"] == words
        table = f"size={host.status()['table_bytes']},share=on,readonly=on,mem-path={directory / 'table'}"
        assert f"memory-backend-file,id=coherency-{name}-table,{table}" in words
        assert (directory / "table").stat().st_size == host.status()["table_bytes"]
        assert any(str(directory / "vm") in word for word in document["virtiofsd"])
        assert os.listdir(directory / "vm") == ["export"]
        libvirt = coherency(*asked, "--format", "libvirt")
        assert libvirt.stdout == document["libvirt"]
        assert document["mount"] in libvirt.stderr


def test_with_a_memfd_one_is_told_that_the_machine_will_not_survive_a_restart(host: Host) -> None:
    asked = ("vm-args", host.name, "--guest", "vm1", "--runtime-dir", host.runtime_dir)
    printed = coherency(*asked)
    assert printed.returncode == 0
    assert "will not survive a restart of the daemon" in printed.stderr
    assert any(str(host.export) in word for word in json.loads(coherency(*asked, "--json").stdout)["virtiofsd"])


def test_an_evicted_guest_comes_back_with_nothing_cached(host: Host) -> None:
    evicted = host.mount("evicted", "strict")
    try:
        (evicted / "file").write_text("1")
        assert (evicted / "file").stat().st_size == 1
        (before,) = [each for each in host.status()["guests"] if each["name"] == "evicted"]
        done = coherency("evict", host.name, "evicted", "--json", "--runtime-dir", host.runtime_dir)
        assert json.loads(done.stdout) == {"name": host.name, "guest": "evicted", "evicted": 1}
        until(lambda: [each for each in host.status()["guests"] if each["guest_id"] > before["guest_id"]])
        assert before["guest_id"] not in [each["guest_id"] for each in host.status()["guests"]]
        assert (evicted / "file").stat().st_size == 1
        assert "it has evicted this guest" in host.guests["evicted"].logged()
    finally:
        host.guests.pop("evicted").stop()
    nobody = coherency("evict", host.name, "evicted", "--runtime-dir", host.runtime_dir)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "asked for a guest that is not here: 'evicted'" in nobody.stderr


# ---- demo ----


def demo(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = coherency("demo", "--json", *arguments, cwd=directory, TMPDIR=str(directory))
    assert mount_points(directory) == []
    assert os.listdir(directory) == []
    return done


def test_demo(socket_dir: Path) -> None:
    done = demo(socket_dir)
    report = json.loads(done.stdout)
    assert (done.returncode, report["stale"]) == (0, 0)
    first, again, *_, last = report["steps"]
    assert first["host_trips"] > 1000
    assert again["host_trips"] == last["host_trips"] == 0
    assert all(step["stale"] == 0 for step in report["steps"])
    assert any("renames" in step["what"] for step in report["steps"])
    assert "No stale answer." in done.stderr


def test_demo_without_recalls(socket_dir: Path) -> None:
    done = demo(socket_dir, "--live-dangerously")
    report = json.loads(done.stdout)
    assert done.returncode == 0, "it has shown what it was to show"
    assert report["stale"] == sum(step["stale"] for step in report["steps"]) > 0
    assert "STALE" in done.stderr


def test_demo_that_is_stopped_leaves_nothing(socket_dir: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "coherency", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=socket_dir,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(socket_dir), "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        output = b""
        while b"for the first time" not in output:
            ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
            assert ready
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, output
            output += piece
        assert len(mount_points(socket_dir)) == 3
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert mount_points(socket_dir) == []
    assert os.listdir(socket_dir) == []

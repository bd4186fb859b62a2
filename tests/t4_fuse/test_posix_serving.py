"""``serve --table posix``: the table under its stable name, through deaths at any moment."""

import os
from pathlib import Path

from coherency.guest_agent.client import fetch_status
from coherency.shm_abi import DEFAULT_SLOT_COUNT, bytes_needed
from tests.guests import Host

OBJECTS = Path("/dev/shm")


def test_a_killed_daemon_s_table_is_adopted_under_a_higher_epoch(socket_dir: Path) -> None:
    name = f"posix-{os.getpid()}"
    with Host(socket_dir, "--table", "posix", name=name) as host:
        link = host.runtime_dir / name / "table"
        assert link.resolve() == OBJECTS / f"coherency-{name}"
        assert (link.stat().st_mode & 0o777, link.stat().st_size) == (0o440, bytes_needed(DEFAULT_SLOT_COUNT))
        before, epoch = link.stat().st_ino, fetch_status(host.runtime_dir, name)["epoch"]
        guest = host.mount("a")
        (guest / "file").write_text("1")
        host.daemon.kill()
        host.serve()
        assert link.stat().st_ino == before
        assert fetch_status(host.runtime_dir, name)["epoch"] > epoch
    assert not (OBJECTS / f"coherency-{name}").exists()


def test_a_table_that_was_never_finished_is_made_anew(socket_dir: Path) -> None:
    name = f"unfinished-{os.getpid()}"
    unfinished = OBJECTS / f"coherency-{name}"
    unfinished.touch(mode=0o440)
    os.truncate(unfinished, bytes_needed(DEFAULT_SLOT_COUNT))  # killed before the magic was stored
    with Host(socket_dir, "--table", "posix", name=name) as host:
        assert "made anew" in host.daemon.logged()
        (host.mount("a") / "file").write_text("1")
        assert (host.share / "file").read_text() == "1"
    assert not unfinished.exists()

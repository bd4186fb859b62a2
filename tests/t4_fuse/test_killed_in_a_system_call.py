"""An agent that is killed while a thread of it hangs in the kernel, behind a change that waits for another guest."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guests import Host
from tests.mounts import detach
from tests.scenarios.comparing import UserProcess
from tests.waiting import until

LEASE_S = 8.0


def warm(path: Path) -> None:
    for _ in range(5):
        os.stat(path)


def is_stuck(pid: int) -> bool:
    """Whether a thread of the process waits for a lock in the kernel."""
    states = [
        Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
        for thread in os.listdir(f"/proc/{pid}/task")
    ]
    return "D" in states


@pytest.mark.parametrize("keeper", ["as it is", "control: killed as well"])
def test_nobody_waits_for_it(keeper: str, make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir(), "--lease", str(LEASE_S)) as host:
        (host.share / "d").mkdir()
        for name in ("d/held", "file"):
            (host.share / name).write_text(name)
        victim, other = host.mount("victim", "strict"), host.mount("other", "strict")
        warm(other / "d/held")
        warm(victim / "file")
        process, silent = host.guests["victim"].process, host.guests["other"].process
        silent.send_signal(signal.SIGSTOP)
        holding = UserProcess(
            host.export, lambda: os.unlink("d/held"), uid=0, gid=0
        )  # holds the directory until the other guest is back
        until(lambda: host.status()["changes_in_flight"] > 0)
        hanging = UserProcess(victim, lambda: Path("d/new").touch(), uid=0, gid=0)
        try:
            until(lambda: is_stuck(process.pid))
            process.send_signal(signal.SIGSTOP)  # it cannot ack
            waiting = UserProcess(host.export, lambda: os.chmod("file", 0o600), uid=0, gid=0)
            until(lambda: host.status()["recalls"] >= 2)
            killed_at = time.monotonic()
            if keeper != "as it is":
                os.kill(keeper_of(process.pid), signal.SIGKILL)
            process.kill()
            assert waiting.result() is None
            waited_s = time.monotonic() - killed_at
            assert (waited_s < LEASE_S / 4) == (keeper == "as it is")
        finally:
            silent.send_signal(signal.SIGCONT)
        assert holding.result() is None
        hanging.result()
        process.wait()
        detach(victim)


def keeper_of(pid: int) -> int:
    children = [
        int(child)
        for task in os.listdir(f"/proc/{pid}/task")
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    ]
    (keeper,) = children
    return keeper

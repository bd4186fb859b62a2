"""An agent that is stopped while a change of its guest waits for other guests: nobody is told of that."""

import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from coherency.fuse.codec import Request, decode
from coherency.guest_agent.filesystem import _unless_interrupted
from tests import fuse_messages
from tests.granting_guest import GrantingGuest, InBackground
from tests.guests import Host
from tests.waiting import until

LEASE_S = 20.0  # nothing here waits for its end


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir(), "--lease", str(LEASE_S)) as host:
        yield host


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_the_change_is_made_all_the_same(host: Host) -> None:
    (host.share / "file").touch(0o600)
    changing, agent = host.mount("changing", "strict"), host.guests["changing"].process
    with GrantingGuest(host, "slow") as slow:
        slow.warm(lambda: os.stat(slow.path / "file"))
        with slow.shut() as gate:
            change = InBackground(os.chmod, changing / "file", 0o640)
            gate.await_reached()
            for _ in range(3):
                agent.send_signal(signal.SIGSTOP)
                until(lambda: is_stopped(agent.pid))
                agent.send_signal(signal.SIGCONT)
            assert not change.is_over
        change.wait()
    assert (host.share / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("gives_up", [False, True])
def test_who_is_interrupted_itself_is_told(gives_up: bool) -> None:
    errors = [InterruptedError(errno.EINTR, "once")]

    def operation(request: Request) -> Sequence[bytes]:
        request.interrupted = gives_up
        if errors:
            raise errors.pop()
        return (b"done",)

    request = decode(memoryview(fuse_messages.request("STATFS")))
    with pytest.raises(InterruptedError) if gives_up else nullcontext():
        assert _unless_interrupted(operation)(request) == (b"done",)

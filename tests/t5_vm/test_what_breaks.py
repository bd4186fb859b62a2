"""What breaks, and what must be true then: nothing old is shown, and nobody waits longer than a lease for who is gone.

The last file of this level, since its tests end machines. Each test begins with two machines that have mounted ours in `strict`, and
a file that the kernel of each answers for by itself.
"""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guests import Host
from tests.t5_vm.bed import Bed
from tests.vm.guest import Guest
from tests.vm.machine import FURTHER
from tests.waiting import until

DEADLINE_S = 60.0
ATTEMPTS = 5
"""Each look may come just when the lease has to be begun anew, which brings the truth as well."""
MODES = itertools.cycle(range(0o600, 0o700))


class File:
    """A file that all look at."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        (host.share / name).write_bytes(b"content")
        self.mode = 0

    def change(self) -> None:
        """By the host. Returns when the change is done: whoever had the old state in his kernel has it no more."""
        self.mode = next(MODES)
        os.chmod(self.host.export / self.name, self.mode)

    def seen_by(self, guest: Guest) -> int:
        return guest.machine.call(os.stat, guest.mountpoint / self.name).st_mode & 0o777

    def held_by(self, guest: Guest) -> bool:
        """Whether that guest's kernel answers by itself: virtiofsd hears nothing of a look."""
        before = guest.machine.virtiofs_answers(FURTHER)
        assert self.seen_by(guest) == self.mode
        return guest.machine.virtiofs_answers(FURTHER) == before


@pytest.fixture
def guests(bed: Bed) -> tuple[Guest, Guest]:
    both = bed.both_mounted("strict")
    return both["vm1"], both["vm2"]


@pytest.fixture
def file(bed: Bed, guests: tuple[Guest, Guest], request: pytest.FixtureRequest) -> File:
    file = File(bed.host, request.node.name)
    file.change()
    for guest in guests:
        until(lambda guest=guest: file.held_by(guest), deadline_s=DEADLINE_S)  # type: ignore[misc]
    return file


def names(bed: Bed) -> set[str]:
    """Of the guests that the daemon knows."""
    return {guest["name"] for guest in bed.host.status()["guests"]}


def is_seen(file: File, guest: Guest) -> Callable[[], bool]:
    """Whether a look finds what is true; errors are no answer, neither right nor wrong."""

    def look() -> bool:
        try:
            return file.seen_by(guest) == file.mode
        except OSError:
            return False

    return look


def test_a_change_made_directly_in_the_share_is_seen_soon(guests: tuple[Guest, Guest], file: File) -> None:
    """Past the export: nobody can be told before, but whoever has the old state is told then."""
    file.mode = next(MODES)
    os.chmod(file.host.share / file.name, file.mode)
    for guest in guests:
        until(is_seen(file, guest), deadline_s=DEADLINE_S)


def test_a_killed_agent_keeps_nobody_waiting_and_its_mount_answers_nothing(
    bed: Bed, guests: tuple[Guest, Guest], file: File
) -> None:
    victim, other = guests
    assert victim.end_agent(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: victim.name not in names(bed))
    assert bed.host.status()["lost_guests"] == 0  # it said goodbye: its keeper did
    file.change()
    assert file.seen_by(other) == file.mode
    with pytest.raises(OSError, match="not connected"):
        file.seen_by(victim)
    victim.mount("strict")
    assert file.seen_by(victim) == file.mode


def test_a_killed_machine_keeps_a_change_waiting_for_its_lease_and_can_come_back(
    bed: Bed, guests: tuple[Guest, Guest], file: File
) -> None:
    victim, other = guests
    victim.machine.kill()
    file.change()
    assert file.seen_by(other) == file.mode
    assert victim.name not in names(bed)
    back = bed.both_mounted("strict")[victim.name]
    assert file.seen_by(back) == file.mode


def test_a_paused_machine_is_evicted_and_forgets_when_it_goes_on(
    bed: Bed, guests: tuple[Guest, Guest], file: File
) -> None:
    victim, other = guests
    evictions = bed.host.status()["evictions"]
    victim.machine.qmp("stop")
    file.change()  # waits for its lease
    assert bed.host.status()["evictions"] == evictions + 1
    assert file.seen_by(other) == file.mode
    victim.machine.qmp("cont")
    until(is_seen(file, victim), deadline_s=DEADLINE_S)
    until(lambda: victim.name in names(bed), deadline_s=DEADLINE_S)
    until(lambda: file.held_by(victim), deadline_s=DEADLINE_S)
    file.change()
    assert file.seen_by(victim) == file.mode


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_mounts_go_on_with_the_next_daemon(bed: Bed, guests: tuple[Guest, Guest], file: File, end: str) -> None:
    """`--table posix`: the machines keep the table, and virtiofsd what it serves."""
    if end == "stopped":
        bed.host.daemon.stop()
    else:
        bed.host.daemon.kill()
    bed.host.serve()
    file.change()
    for guest in guests:
        until(is_seen(file, guest), deadline_s=DEADLINE_S)
        until(lambda guest=guest: guest.name in names(bed), deadline_s=DEADLINE_S)  # type: ignore[misc]
        until(lambda guest=guest: file.held_by(guest), deadline_s=DEADLINE_S)  # type: ignore[misc]
    file.change()
    assert [file.seen_by(guest) for guest in guests] == [file.mode, file.mode]


def test_a_cut_control_line_ends_trust_until_it_is_back(bed: Bed, guests: tuple[Guest, Guest], file: File) -> None:
    victim, other = guests
    chardev = f"coherency-{bed.host.name}-control"
    path = bed.host.runtime_dir / bed.host.name / "control.sock"
    reach(victim, chardev, path.with_name("nobody"))
    until(lambda: victim.name not in names(bed))
    for _ in range(3):
        file.change()
        assert file.seen_by(other) == file.mode
        until(is_seen(file, victim), deadline_s=DEADLINE_S)
    assert not file.held_by(victim)
    reach(victim, chardev, path)
    until(lambda: victim.name in names(bed), deadline_s=DEADLINE_S)
    until(lambda: file.held_by(victim), deadline_s=DEADLINE_S)
    file.change()
    assert [file.seen_by(guest) for guest in guests] == [file.mode, file.mode]


def reach(guest: Guest, chardev: str, path: Path) -> None:
    """Let QEMU connect a character device to another socket; it tries again as long as nobody listens there."""
    address = {"type": "unix", "data": {"path": str(path)}}
    data = {"addr": address, "server": False, "reconnect": 1}
    guest.machine.qmp("chardev-change", id=chardev, backend={"type": "socket", "data": data})


def test_a_killed_virtiofsd_keeps_nobody_else_waiting(bed: Bed, guests: tuple[Guest, Guest], file: File) -> None:
    """What its own machine then asks of it never comes back, as with any mount of virtiofs: the machine must be restarted.

    The last test that needs it: a start takes half a minute.
    """
    victim, other = guests
    victim.machine.virtiofsds[FURTHER].kill()
    assert file.seen_by(victim) == file.mode  # its kernel has that
    file.change()
    assert file.seen_by(other) == file.mode
    assert victim.name in names(bed)  # it has forgotten and said so, which needs no virtiofsd
    victim.machine.kill()


# --- a machine whose daemon keeps no table, and tells nobody ------------------------------------------------------------


@pytest.fixture(scope="module")
def third(make_socket_dir: Callable[[], Path]) -> Iterator[tuple[Host, Guest]]:
    """It has mounted ours in `strict`; the recalls of its daemon are switched off."""
    directory = make_socket_dir()
    with (
        Host(directory, "--live-dangerously", "no-recalls") as host,
        Guest("vm3", directory / "vm3", host.runtime_dir, host.name) as guest,
    ):
        guest.wait_until_ready()
        guest.mount("strict")
        yield host, guest


def test_control_whom_nobody_tells_sees_the_past(third: tuple[Host, Guest]) -> None:
    """The look of all these tests, at the same kind of mount: it would find an old state if there were one."""
    host, guest = third
    file = File(host, "f")
    file.change()

    def is_seen_late() -> bool:
        until(lambda: file.held_by(guest), deadline_s=DEADLINE_S)
        file.change()
        is_late = file.seen_by(guest) != file.mode
        until(is_seen(file, guest), deadline_s=DEADLINE_S)
        return is_late

    assert any(is_seen_late() for _ in range(ATTEMPTS))


def test_with_a_memfd_a_machine_says_that_it_has_the_table_of_a_daemon_that_is_gone(third: tuple[Host, Guest]) -> None:
    host, guest = third
    host.daemon.stop()
    host.serve()
    until(lambda: "restart the machine too, or serve with --table posix" in guest.logged(), deadline_s=DEADLINE_S)
    with pytest.raises(OSError, match=r"."):
        guest.machine.call(os.stat, guest.mountpoint / "f")

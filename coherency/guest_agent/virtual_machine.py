"""How an agent in a virtual machine reaches the daemon: a serial port for the control channel, a PCI device for the table.

Rules:

1. Both are found in sysfs: the port by its name, the table by its id, which the daemon's Welcome says.
2. The port is a line that agents use one after the other (docs/spec/control.md, section 9).  One process has it open at a
   time; while the host's end is closed it hangs up on every poll.  What it does not take at once is sent later.
3. The table is mapped read-only.  Nothing of what is shared is ever written to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from coherency.errors import LineUnavailable, TableError
from coherency.guest_agent.channel import READ_BYTES, Channel, wait_readable
from coherency.guest_agent.standstill import Standstill
from coherency.protocol import Welcome
from coherency.rendezvous import VIRTIO_PORT_NAME
from coherency.shm_memory import map_pci_region, pci_devices
from coherency.shm_table import TableReader

IVSHMEM: Final = (0x1AF4, 0x1110)
"""Vendor and device of QEMU's ivshmem-plain; its shared memory is region 2."""
IVSHMEM_REGION: Final = 2
_LOOK_AGAIN_NS: Final = 20_000_000


class SerialStream:
    """An open port, which it owns; any character device without modes of its own would do, or half of a socket pair."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """See `Stream`."""
        return self._fd

    def write(self, data: bytes) -> int:
        """See `Stream`."""
        return os.write(self._fd, data)

    def read(self, *, with_descriptors: bool) -> tuple[bytes, list[int]]:
        """See `Stream`."""
        return os.read(self._fd, READ_BYTES), []

    def hang_up(self) -> None:
        """See `Stream`; the host's end is not ours to close."""

    def close(self) -> None:
        """See `Stream`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class VirtualMachine:
    """The way out of one virtual machine to the daemon that guests call `name`."""

    line: Final = "serial"

    def __init__(
        self, name: str, *, port: str = VIRTIO_PORT_NAME, sysfs: Path = Path("/sys"), devices: Path = Path("/dev")
    ) -> None:
        self._name = name
        self._port = port
        self._ports = sysfs / "class/virtio-ports"
        self._pci = sysfs / "bus/pci/devices"
        self._devices = devices

    def dial(self, *, deadline_ns: int, wakeup: int | None) -> Channel:
        """Open the port as soon as nobody else has it and its host end is open.

        Raises `LineUnavailable` if there is no such port, or not before the deadline; `Interrupted`.
        """
        fd = self._open(deadline_ns, wakeup)
        try:
            while _is_hung_up(fd):
                self._wait("the host's end of the port is closed (does the daemon serve, and QEMU reconnect?)", deadline_ns, wakeup)
        except BaseException:
            os.close(fd)
            raise
        channel = Channel(SerialStream(fd), self._name, wakeup)
        channel.hunt()
        return channel

    def _open(self, deadline_ns: int, wakeup: int | None) -> int:
        path = self._find_port()
        while True:
            try:
                return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise LineUnavailable(self._name, f"cannot open {path}: {error.strerror}") from error
            self._wait(f"another process has {path} open: there is one mount for each port", deadline_ns, wakeup)

    def _wait(self, reason: str, deadline_ns: int, wakeup: int | None) -> None:
        remaining_ns = deadline_ns - time.monotonic_ns()
        if remaining_ns <= 0:
            raise LineUnavailable(self._name, reason)
        wait_readable(wakeup, None, min(_LOOK_AGAIN_NS, remaining_ns))

    def _find_port(self) -> Path:
        names = []
        for entry in sorted(self._ports.glob("*")):
            with contextlib.suppress(OSError):  # it may be unplugged at any time
                name = (entry / "name").read_text().strip()
                if name == self._port:
                    return self._devices / entry.name
                names.append(name)
        there = ", ".join(filter(None, names)) or "none"
        raise LineUnavailable(self._name, f"this machine has no virtio-serial port '{self._port}', but {there}")

    def map_table(self, welcome: Welcome, descriptors: list[int]) -> TableReader:
        """The table of `welcome`, out of the devices that there are.  Raises `TableError` if none of them has it."""
        wanted = (welcome.table_id_high, welcome.table_id_low)
        reasons = []
        for device in pci_devices(*IVSHMEM, self._pci):
            try:
                memory = map_pci_region(device, IVSHMEM_REGION, welcome.table_bytes)
                # The reader alone keeps the mapping: other threads may still compare words of a reader that was withdrawn.
                return TableReader(memory.words, trust_ns=welcome.trust_ns, table_id=wanted)
            except TableError as error:
                reasons.append(f"{device.name}: {error}")
        if not reasons:
            raise TableError("this machine has no ivshmem device, in which the version table should be: see coherency vm-args")
        raise TableError(
            "the daemon's version table is not in this machine; if the daemon was restarted, restart the machine too, or serve "
            f"with --table posix ({'; '.join(reasons)})"
        )

    def watch(self, reader: TableReader, clock_ns: Callable[[], int]) -> Callable[[], str | None]:
        """See `Link`."""
        return Standstill(reader, clock_ns).trouble


def _is_hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))

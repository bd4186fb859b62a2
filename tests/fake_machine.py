"""What an agent in a virtual machine finds, made without one: a serial port, and PCI devices in a directory like that of sysfs.

The port is a pseudo terminal in raw mode: a character device that takes some bytes at a time and hangs up when its other end is
closed. What QEMU does, a thread does: it connects to a control socket, carries bytes both ways, and when the daemon closes the
connection it lets the port hang up and connects again. Unlike virtio-serial a pseudo terminal cannot be taken up again after that, so
there is a new one behind the same name.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import tty
from pathlib import Path
from typing import Self

from coherency.guest_agent.virtual_machine import VirtualMachine
from coherency.rendezvous import VIRTIO_PORT_NAME

_LOOK_AGAIN_S = 0.02
PORT = "vport1p1"


def add_pci_device(sysfs: Path, address: str, resource: str | os.PathLike[str], *, vendor: int = 0x1AF4, device: int = 0x1110) -> Path:
    """A device whose region 2 is the file `resource`."""
    path = sysfs / "bus/pci/devices" / address
    path.mkdir(parents=True)
    (path / "vendor").write_text(f"{vendor:#06x}\n")
    (path / "device").write_text(f"{device:#06x}\n")
    (path / "enable").write_text("0\n")
    (path / "resource2").symlink_to(resource)
    return path


class FakeMachine:
    """A context manager: a machine whose QEMU is connected to the socket at `control` whenever somebody listens there."""

    def __init__(self, directory: Path, control: Path, *, port: str = VIRTIO_PORT_NAME) -> None:
        self.sysfs, self.devices = directory / "sys", directory / "dev"
        self.control = control
        self.connections = 0
        self.devices.mkdir()
        (self.sysfs / "class/virtio-ports" / PORT).mkdir(parents=True)
        (self.sysfs / "class/virtio-ports" / PORT / "name").write_text(f"{port}\n")
        (self.sysfs / "bus/pci/devices").mkdir(parents=True)
        self._stop = threading.Event()
        self._cut = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def link(self, name: str = "share-1") -> VirtualMachine:
        """The way out for an agent in this machine."""
        return VirtualMachine(name, sysfs=self.sysfs, devices=self.devices)

    def cut(self) -> None:
        """Let go of the connection, as if the daemon had closed it."""
        self._cut.set()

    def write_as_agent(self, data: bytes) -> None:
        """What an agent leaves behind that is killed after saying so much."""
        fd = os.open(self.devices / PORT, os.O_RDWR | os.O_NOCTTY)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_AGAIN_S):
            with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
                connection.connect(str(self.control))
                self._carry(connection)

    def _carry(self, connection: socket.socket) -> None:
        master, slave = os.openpty()  # the port's end stays open here, lest the other one fails while no agent is there
        node = self.devices / PORT
        try:
            tty.setraw(slave)
            os.set_blocking(master, False)
            node.symlink_to(os.ttyname(slave))
            self.connections += 1
            self._cut.clear()
            while not self._stop.is_set() and not self._cut.is_set():
                readable, _, _ = select.select([master, connection.fileno()], [], [], _LOOK_AGAIN_S)
                if master in readable:
                    connection.sendall(os.read(master, 65536))
                if connection.fileno() in readable:
                    data = connection.recv(1024)
                    if not data:
                        return
                    with contextlib.suppress(BlockingIOError):  # nobody has read for long; QEMU would hold it back
                        os.write(master, data)
        finally:
            node.unlink(missing_ok=True)
            os.close(slave)
            os.close(master)

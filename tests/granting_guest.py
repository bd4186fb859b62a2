"""A guest mount in this process whose kernel may keep things: what it asks is counted, and its recalls can be held."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from coherency.fuse.codec import Request
from coherency.fuse.session import Deferred, Reply, Session
from coherency.guest_agent.echoes import Echoes
from coherency.guest_agent.granting import GrantingFileSystem
from coherency.guest_agent.grants import Grants
from coherency.guest_agent.mount import GuestMount, MountOptions
from coherency.guest_agent.recalls import Recalls
from coherency.ids import NodeId
from tests.guests import Host
from tests.waiting import until


class Gate:
    """A place where threads of the guest wait while it is shut."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        if not self._open.is_set():
            self.reached.set()
            assert self._open.wait(60), "nobody opens the gate"

    def await_reached(self) -> None:
        assert self.reached.wait(20), "nobody comes to the gate"


class HeldKernel:
    """A session whose notifications wait at a gate."""

    def __init__(self, session: Session, gate: Gate) -> None:
        self._session, self._gate = session, gate
        self.entries = self.page_drops = 0

    @property
    def is_gone(self) -> bool:
        return self._session.is_gone

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool:
        self._gate.pass_through()
        self.page_drops += offset >= 0
        return self._session.invalidate_inode(node, offset, length)

    def invalidate_entry(self, parent: NodeId, name: bytes) -> bool:
        self.entries += 1
        return self._session.invalidate_entry(parent, name)

    def increment_epoch(self) -> bool:
        return self._session.increment_epoch()


class GrantingGuest:
    """A context manager: mounted inside, as ``path``."""

    def __init__(
        self, host: Host, name: str = "here", mode: str = "strict", *, danger: str = "", events: bool = False
    ) -> None:
        self.path = host.directory / name
        self.path.mkdir()
        self._mount = GuestMount(
            MountOptions(host.name, self.path, host.runtime_dir, mode, guest_name=name, danger=danger, events=events)
        )
        self.gate = Gate()

    def __enter__(self) -> Self:
        """Mounted."""
        self._mount.start()
        assert self._mount._session is not None
        assert isinstance(self._mount._file_system, GrantingFileSystem)
        self.session, self.fs = self._mount._session, self._mount._file_system
        self.kernel = HeldKernel(self.session, self.gate)
        self.recalls._kernel = self.recalls._pages._kernel = self.kernel
        return self

    def __exit__(self, *exc: object) -> None:
        self.gate.open()
        self._mount.close()
        if self._mount.echoes is not None:
            self._mount.echoes.check()
        self.grants.check()
        self.session.check()

    @property
    def client(self) -> Any:
        return self._mount.client

    @property
    def grants(self) -> Grants:
        return self.fs.grants

    @property
    def recalls(self) -> Recalls:
        assert self.fs._recalls is not None
        return self.fs._recalls

    @property
    def echoes(self) -> Echoes:
        """Of one that wants events."""
        assert self._mount.echoes is not None
        return self._mount.echoes

    @property
    def requests(self) -> int:
        """What the kernel has asked so far."""
        return self.session.statistics().requests

    def asks(self, look: Callable[[], object]) -> int:
        """How many requests ``look`` makes."""
        before = self.requests
        look()
        return self.requests - before

    def warm(self, *looks: Callable[[], object]) -> None:
        """Look until the kernel asks no more."""
        until(lambda: not sum(self.asks(look) for look in looks))

    @contextlib.contextmanager
    def shut(self) -> Iterator[Gate]:
        """No recall gets on inside the block."""
        self.gate.shut()
        try:
            yield self.gate
        finally:
            self.gate.open()


class HeldOperation:
    """``with HeldOperation(guest, Opcode.CREATE) as gate``: such requests are not begun before the gate is open, or the block left."""

    def __init__(self, guest: GrantingGuest, opcode: int) -> None:
        self._operations, self._opcode = guest.session._operations, int(opcode)
        self._operation = self._operations[self._opcode]
        self.gate = Gate()

    def __enter__(self) -> Gate:
        def held(request: Request) -> Reply | Deferred:
            self.gate.pass_through()
            return self._operation(request)

        self._operations[self._opcode] = held
        self.gate.shut()
        return self.gate

    def __exit__(self, *exc: object) -> None:
        self._operations[self._opcode] = self._operation
        self.gate.open()


class InBackground:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., object], *arguments: Any) -> None:
        self._call, self._arguments = call, arguments
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call(*self._arguments)
        except BaseException as error:  # noqa: BLE001 - told to who waits
            self.error = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float = 30) -> None:
        self._thread.join(timeout_s)
        assert self.is_over, f"{self._call} does not end"
        if self.error is not None:
            raise self.error


def state(path: Path | str) -> tuple[int, ...]:
    """What ``stat`` tells, without the access time; empty if there is nothing."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_size, found.st_mtime_ns

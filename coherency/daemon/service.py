"""One daemon: everything that serves one share under one name, put together and taken apart in order.

Start: claim the name, table (closed), export, control channel, table serving. Stop: table closed first, so that no agent
trusts what it has; then the control channel, the export, the name. A killed daemon stops at any point of that: the next
one finds an unclean name and holds changes until no agent can trust the old table any more. If it is stopped before
that, it does not give the name free sooner either.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coherency.daemon.changes import Changes
from coherency.daemon.export import Export
from coherency.daemon.runtime import RuntimeDirectory
from coherency.daemon.server import ControlServer
from coherency.errors import TableError, UsageError
from coherency.fuse.nodes import descriptor_budget
from coherency.fuse.session import Session
from coherency.ids import Epoch
from coherency.protocol import Welcome
from coherency.protocol_fields import ReportValue
from coherency.shm_memory import OwnedMemory, create_memfd, create_posix
from coherency.shm_table import (
    DEFAULT_SLOT_COUNT,
    HEARTBEAT_PERIOD_NS,
    TRUST_MARGIN_NS,
    TRUST_NS,
    State,
    TableWriter,
    bytes_needed,
)

log = logging.getLogger(__name__)

_SECOND_NS: Final = 1_000_000_000
_PREDECESSOR_ENDS_NS: Final = _SECOND_NS
_LOOK_AGAIN_S: Final = 0.02


@dataclass(frozen=True)
class ServiceOptions:
    """What the operator asked for."""

    share: Path
    name: str
    runtime_root: Path
    posix_table: bool = False
    slot_count: int = DEFAULT_SLOT_COUNT
    gid: int | None = None  # of whoever may be a guest, beside this user
    live_dangerously: bool = False


class Service:
    """A serving daemon, from ``start()`` to ``close()``. Both may be called from any thread, each once has an effect."""

    def __init__(self, options: ServiceOptions) -> None:
        self.options = options
        self.directory = RuntimeDirectory(options.runtime_root, options.name)
        self._started_at_ns = time.monotonic_ns()
        self._undo = contextlib.ExitStack()
        self._stop_beating = threading.Event()
        self._close_lock = threading.Lock()

    def start(self) -> None:
        """Everything is up when this returns; nothing is left behind when it raises."""
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()

    def _start(self, undo: contextlib.ExitStack) -> None:
        options, directory = self.options, self.directory
        share = _open_share(options.share, directory)
        with contextlib.ExitStack() as until_owned:
            until_owned.callback(os.close, share)
            claim = directory.claim()
            claimed_at_ns = time.monotonic_ns()
            undo.callback(claim.release)
            hold_until_ns = claimed_at_ns + TRUST_NS + TRUST_MARGIN_NS if claim.unclean else 0
            # A name given free before would be a clean one to the next daemon, which would not wait for the rest.
            undo.callback(_wait_until, hold_until_ns)
            undo.callback(_only_daemon_of(share, options.share).close)
            if options.posix_table:
                refusal = f"another daemon serves from the table of '{options.name}'; choose another --name"
                undo.callback(_mark(f"table/{options.name}", refusal).close)
            self._hand_to_group(directory.path)
            memory, table = self._make_table()
            self.table = table
            undo.callback(memory.close)
            undo.callback(memory.unlink)
            os.symlink(memory.path, directory.table)
            self.changes = Changes(table, hold_until_ns=hold_until_ns, live_dangerously=options.live_dangerously)
            export = self.export = Export(share, self.changes, descriptor_limit=descriptor_budget())
            until_owned.pop_all()
        try:
            self.session = Session.mount(
                str(directory.export), export, source=f"coherency:{options.name}", name=f"export-{options.name}"
            )
        except BaseException:
            export.close()
            raise
        undo.callback(self.session.close)
        self.session.start()
        read_only = memory.read_only_fd()
        undo.callback(os.close, read_only)
        high, low = table.table_id
        welcome = Welcome(
            0, 0, 0, high, low, table.table_bytes, TRUST_NS, os.path.abspath(options.share), str(directory.export)
        )
        self.server = ControlServer(
            directory.control_socket,
            welcome=welcome, table_fd=read_only, status=self.report, invalidate=table.advance_epoch,
        )  # fmt: skip
        undo.callback(self.server.close)
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        undo.callback(heart.join)
        undo.callback(self._stop_beating.set)
        undo.callback(table.close)
        table.set_state(State.SERVING)
        self.server.start()
        self._hand_to_group(directory.control_socket)

    def _hand_to_group(self, path: Path) -> None:
        if self.options.gid is not None:
            os.chown(path, -1, self.options.gid)

    def _make_table(self) -> tuple[OwnedMemory, TableWriter]:
        """Fresh memory with a table, or the one that a killed predecessor left under a stable name."""
        memory = self._make_memory()
        try:
            if memory.existed:
                try:
                    return memory, TableWriter.adopt(memory.words)
                except TableError as error:  # its owner was killed while formatting it: nobody ever served from it
                    log.warning("%s is made anew: %s", memory.path, error)
                    memory.unlink()
                    memory.close()
                    memory = self._make_memory()
            table_id = (secrets.randbits(64), secrets.randbits(64))
            slot_count = self.options.slot_count
            return memory, TableWriter.create(memory.words, slot_count=slot_count, table_id=table_id)
        except BaseException:
            memory.close()
            raise

    def _make_memory(self) -> OwnedMemory:
        size = bytes_needed(self.options.slot_count)
        if self.options.posix_table:
            return create_posix(f"/coherency-{self.options.name}", size, gid=self.options.gid)
        return create_memfd(f"coherency-{self.options.name}", size)

    def _beat(self) -> None:
        while not self._stop_beating.wait(HEARTBEAT_PERIOD_NS / _SECOND_NS):
            self.table.beat()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until somebody unmounts the export behind our back; false after ``timeout_s``."""
        return self.session.wait(timeout_s)

    def close(self) -> None:
        """Stop in order. Who uses the export gets errors from now on."""
        with self._close_lock:
            undo, self._undo = self._undo, contextlib.ExitStack()
        undo.close()

    def invalidate(self) -> Epoch:
        return self.table.advance_epoch()

    def report(self) -> Mapping[str, ReportValue]:
        """The daemon's part of ``coherency status``."""
        table, session, nodes = self.table.statistics(), self.session.statistics(), self.export.nodes.statistics()
        return {
            "name": self.options.name,
            "share": os.path.abspath(self.options.share),
            "export": str(self.directory.export),
            "pid": os.getpid(),
            "uptime_ns": time.monotonic_ns() - self._started_at_ns,
            "epoch": table.epoch,
            "bumps": table.bumps,
            "changes_in_flight": table.changes_in_flight,
            "table_bytes": table.table_bytes,
            "slot_count": table.slot_count,
            "table_kind": "posix" if self.options.posix_table else "memfd",
            "requests": session.requests,
            "nodes": nodes.nodes,
            "descriptors": nodes.descriptors,
            "bumping": "on" if self.changes.bumps else "off",
        }


def _wait_until(at_ns: int) -> None:
    time.sleep(max(0, at_ns - time.monotonic_ns()) / _SECOND_NS)


def _only_daemon_of(share: int, path: Path) -> socket.socket:
    """What makes this process the only daemon of the directory: two would not tell each other's guests of their changes.

    Not a lock of the directory, which programs on the host may want for themselves.
    """
    status = os.fstat(share)
    return _mark(
        f"share/{status.st_dev}/{status.st_ino}",
        f"another daemon serves {path} under another name: guests of the one would not see changes of the other",
    )


def _mark(label: str, refusal: str) -> socket.socket:
    """A name that one process of this machine can have, until it closes it or ends. ``UsageError`` if another has it."""
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    deadline_ns = time.monotonic_ns() + _PREDECESSOR_ENDS_NS
    while True:
        try:
            mark.bind(f"\0coherency/{label}")
        except OSError as error:
            # One that was just killed may have let go of its runtime directory already, and of this not yet.
            if error.errno == errno.EADDRINUSE and time.monotonic_ns() < deadline_ns:
                time.sleep(_LOOK_AGAIN_S)
                continue
            mark.close()
            raise UsageError(refusal) from error
        return mark


def _open_share(share: Path, directory: RuntimeDirectory) -> int:
    try:
        fd = os.open(share, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        raise UsageError(f"{share} is not a directory: a share is a directory tree") from None
    except OSError as error:
        raise UsageError(f"cannot open the share {share}: {error.strerror}") from error
    try:
        resolved = Path(os.path.realpath(share))
        runtime = Path(os.path.realpath(directory.path))
        if runtime == resolved or resolved in runtime.parents:
            raise UsageError(
                f"the runtime directory {runtime} lies inside the share {resolved}: the export would contain itself; "
                "choose another one with --runtime-dir"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd

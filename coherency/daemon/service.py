"""One daemon: everything that serves one share under one name, put together and taken apart in order.

Start: claim the name, table (closed), export, control channel, table serving. Stop: table closed first, so that no agent
trusts what it has or grants anything; then all guests are told to forget everything and waited for, one lease at most;
then the control channel, the export, the name. A killed daemon stops at any point of that: the next one finds an unclean
name and holds changes until no agent can trust the old table and no kernel can have anything that was granted under it.
A daemon that is stopped before that, or does not wait for its guests, leaves the name unclean, too.
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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coherency.daemon.changes import Changes
from coherency.daemon.events import Events
from coherency.daemon.export import Export
from coherency.daemon.holds import Hold
from coherency.daemon.journal import SessionJournal
from coherency.daemon.leasing import Leasing
from coherency.daemon.ledger import Ledger
from coherency.daemon.origins import Origins
from coherency.daemon.owners import Owners
from coherency.daemon.recalls import Recalls
from coherency.daemon.runtime import Claim, RuntimeDirectory
from coherency.daemon.server import ControlServer
from coherency.daemon.shown import Shown
from coherency.daemon.watch import Watcher
from coherency.daemon.watched import Watched
from coherency.errors import MountError, TableError, UsageError, WatchError
from coherency.fuse import syscalls
from coherency.fuse.mounts import place_of, remove_dead_mount
from coherency.fuse.nodes import descriptor_budget
from coherency.fuse.session import Session
from coherency.leases import DEFAULT_LEASE_NS, agent_lease_ns
from coherency.protocol import Welcome
from coherency.protocol_fields import ReportValue
from coherency.shm_memory import OwnedMemory, create_memfd, create_posix, remove_posix
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
_EXPORT_THREADS: Final = 1024
"""Changes that wait for guests leave threads for those that do not."""
DANGERS: Final = ("no-bumps", "no-recalls")
"""What can be switched off, to see what it is for."""


@dataclass(frozen=True)
class ServiceOptions:
    """What the operator asked for."""

    share: Path
    name: str
    runtime_root: Path
    posix_table: bool = False
    slot_count: int = DEFAULT_SLOT_COUNT
    gid: int | None = None  # of whoever may be a guest, beside this user
    lease_ns: int = DEFAULT_LEASE_NS
    in_place: bool = False
    watch: bool | None = None  # None: if it is possible
    live_dangerously: str | None = None  # one of DANGERS


class Service:
    """A serving daemon, from ``start()`` to ``close()``. Both may be called from any thread, each once has an effect."""

    def __init__(self, options: ServiceOptions) -> None:
        self.options = options
        self.directory = RuntimeDirectory(options.runtime_root, options.name)
        self._started_at_ns = time.monotonic_ns()
        self._undo = contextlib.ExitStack()
        self._stop_beating = threading.Event()
        self._close_lock = threading.Lock()
        self._hurried: Callable[[], bool] = lambda: True
        self._settled = True
        self.hold = Hold()
        self.watcher: Watcher | None = None
        self._why_not_watching = ""

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
            undo.callback(self._release, claim)
            held_until_ns = time.monotonic_ns() + TRUST_NS + TRUST_MARGIN_NS if claim.unclean else 0
            self.journal = SessionJournal(directory.sessions, lease_ns=options.lease_ns, held_until_ns=held_until_ns)
            self.hold = self.journal.hold
            undo.callback(_only_daemon_of(share, options.share).close)
            if options.posix_table:
                undo.callback(_mark_of_table(options.name).close)
            self._hand_to_group(directory.path)
            memory, table = self._make_table()
            self.table = table
            undo.callback(memory.close)
            os.symlink(memory.path, directory.table)
            read_only = memory.read_only_fd()
            undo.callback(os.close, read_only)
            self.server = self._make_server(read_only)
            undo.callback(self.server.close)
            origins = Origins(self.leasing.knows)
            self.recalls = Recalls(self.server, origins)
            self.changes = Changes(
                table, hold=self.hold,
                recalls=None if options.live_dangerously == "no-recalls" else self.recalls,
                bumps=options.live_dangerously != "no-bumps",
            )  # fmt: skip
            watched = self._watch(share)
            if watched is not None:
                undo.callback(watched.close)
            shown = None if watched is None else Shown()
            owners = None if watched is None else Owners()
            events = Events(self.server)
            export = self.export = Export(
                share, self.changes,
                descriptor_limit=descriptor_budget(), origins=origins, shown=shown, owners=owners, events=events,
            )  # fmt: skip
            until_owned.pop_all()
        if watched is not None and shown is not None and owners is not None:
            self.watcher = Watcher(
                watched, self.changes, shown=shown, owners=owners, number_on=export.nodes.number_if_met,
                tell=lambda happened, missing: events.tell(*happened, lost=missing), wanted=lambda: events.wanted,
            )  # fmt: skip
            export.catch_up = self.watcher.catch_up
            undo.callback(self.watcher.close)
        try:
            self.session = Session.mount(
                str(directory.export), export, source=f"coherency:{options.name}", name=f"export-{options.name}",
                max_threads=_EXPORT_THREADS,
            )  # fmt: skip
        except BaseException:
            export.close()
            raise
        undo.callback(self.session.close)
        _as_anybody(self.session.start)
        if options.posix_table:
            directory.window.open()
            self.session.bind(str(directory.window.export))
        if options.in_place:
            self.session.bind(str(options.share))
        undo.callback(self.server.close)
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        undo.callback(heart.join)
        undo.callback(self._stop_beating.set)
        undo.callback(self._settle)
        undo.callback(table.close)
        if self.watcher is not None:
            self.watcher.start()
        table.set_state(State.SERVING)
        self.server.start()
        self._hand_to_group(directory.control_socket)

    def _release(self, claim: Claim) -> None:
        claim.release(clean=self._settled and not self.hold.left_ns(time.monotonic_ns()))

    def _make_server(self, table_fd: int) -> ControlServer:
        options, table = self.options, self.table
        ledger = Ledger(lease_ns=options.lease_ns, slot_count=table.slot_count)
        self.leasing = Leasing(
            ledger, lease_ns=options.lease_ns, journal=self.journal,
            epoch=lambda: table.statistics().epoch, new_session=lambda: secrets.randbits(63) + 1,
        )  # fmt: skip
        high, low = table.table_id
        share, export = os.path.abspath(options.share), str(self.directory.export)
        welcome = Welcome(0, 0, agent_lease_ns(options.lease_ns), high, low, table.table_bytes, TRUST_NS, share, export)
        return ControlServer(
            self.directory.control_socket,
            welcome=welcome, table_fd=table_fd, status=self.report, invalidate=table.advance_epoch, leasing=self.leasing,
        )  # fmt: skip

    def _watch(self, share: int) -> Watched | None:
        """None: nobody watches what is changed past the export."""
        if self.options.watch is False:
            self._why_not_watching = "--no-watch"
            return None
        try:
            return Watched(share, self.options.share)
        except WatchError as error:
            if self.options.watch:
                raise WatchError(f"--watch is not possible here: {error}; leave it out to serve without") from error
            self._why_not_watching = str(error)
            log.warning(
                "changes made directly in %s will not be seen: %s; make them in a guest's mount or in the export, serve it with "
                "--in-place, or say 'coherency invalidate %s' afterwards", self.options.share, error, self.options.name,
            )  # fmt: skip
            return None

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
            return create_posix(_posix_name(self.options.name), size, gid=self.options.gid)
        return create_memfd(f"coherency-{self.options.name}", size)

    def _beat(self) -> None:
        while not self._stop_beating.wait(HEARTBEAT_PERIOD_NS / _SECOND_NS):
            self.table.beat()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until somebody unmounts the export behind our back; false after ``timeout_s``."""
        return self.session.wait(timeout_s)

    def close(self, *, hurried: Callable[[], bool] = lambda: False) -> None:
        """Stop in order: within one lease, and a few seconds. Who uses the export gets errors from now on.

        ``hurried`` is asked again and again: once it says so, no guest is waited for, and the next daemon must.
        """
        self._hurried = hurried
        with self._close_lock:
            undo, self._undo = self._undo, contextlib.ExitStack()
        undo.close()

    def _settle(self) -> None:
        """Until no kernel has anything that was granted, by this daemon or its predecessor, or there is no time for that."""
        over = threading.Event()
        round_ = self.server.recall(None, over.set)
        while (round_.pending or self.hold.left_ns(time.monotonic_ns())) and not self._hurried():
            time.sleep(_LOOK_AGAIN_S)
            if time.monotonic_ns() > round_.until_ns:
                self.server.evict_due()
        self._settled = not round_.pending
        self.hold.give_up()
        self.recalls.give_up()

    def report(self) -> Mapping[str, ReportValue]:
        """The daemon's part of ``coherency status``. Under the control lock."""
        now_ns = time.monotonic_ns()
        table, session, nodes = self.table.statistics(), self.session.statistics(), self.export.nodes.statistics()
        events = self.server.subscribers.statistics()
        ledger, recalls, hold = self.leasing.statistics(), self.recalls.statistics(), self.hold.statistics(now_ns)
        return {
            "name": self.options.name,
            "share": os.path.abspath(self.options.share),
            "export": str(self.directory.export),
            "in_place": self._in_place(),
            "pid": os.getpid(),
            "uptime_ns": now_ns - self._started_at_ns,
            "epoch": table.epoch,
            "bumps": table.bumps,
            "changes_in_flight": table.changes_in_flight,
            "table_bytes": table.table_bytes,
            "slot_count": table.slot_count,
            "table_kind": "posix" if self.options.posix_table else "memfd",
            "requests": session.requests,
            "nodes": nodes.nodes,
            "descriptors": nodes.descriptors,
            **self._watching(),
            "bumping": "on" if self.changes.bumps else "off",
            "recalling": "on" if self.changes.recalls else "off",
            "lease_ns": self.options.lease_ns,
            "keys_held": ledger.keys,
            "recalls": ledger.recalls,
            "evictions": ledger.evictions,
            "lost_guests": ledger.lost,
            "waits": recalls.waits,
            "waited_ns": recalls.waited_ns,
            "longest_wait_ns": recalls.longest_wait_ns,
            "held_ns": hold.left_ns,
            "held_for_guests": hold.guests,
            "subscribers": events.subscribers,
            "events": events.told,
            "events_lost": events.lost,
        }

    def _watching(self) -> dict[str, ReportValue]:
        if self.watcher is None:
            return {"watching": "off", "watching_why": self._why_not_watching, "host_events": 0, "overflows": 0}
        counted, unwatched = self.watcher.statistics(), self.watcher.unwatched()
        why = f"without {len(unwatched)} file systems below the share: see the log" if unwatched else ""
        return {
            "watching": "off" if self.watcher.failed else "in part" if unwatched else "on",
            "watching_why": "it has failed: see the log" if self.watcher.failed else why,
            "host_events": counted.events,
            "overflows": counted.overflows,
        }

    def _in_place(self) -> str:
        return "off" if not self.options.in_place else "on" if self.session.is_everywhere() else "uncovered"


def forget(runtime_root: Path, name: str) -> bool:
    """Remove what daemons of this name keep for virtual machines when they end: the POSIX table, and the window.

    False if there was nothing. Raises ``AlreadyServing`` if one serves now, and like ``RuntimeDirectory.claim``.
    """
    directory = RuntimeDirectory(runtime_root, name)
    had_window = directory.window.path.exists()
    claim = directory.claim()
    try:
        with contextlib.closing(_mark_of_table(name)):
            directory.window.close()
            had_table = remove_posix(_posix_name(name))
    finally:
        claim.release(clean=not claim.unclean)
    return had_window or had_table


def _posix_name(name: str) -> str:
    return f"/coherency-{name}"


def _mark_of_table(name: str) -> socket.socket:
    return _mark(f"table/{name}", f"another daemon serves from the table of '{name}'; choose another --name")


def _as_anybody(start: Callable[[], None]) -> None:
    """``start``, and the threads that it starts, are bound by quotas, and leave alone what a file system reserves for root."""

    def begin() -> None:
        syscalls.drop_capability(syscalls.CAP_SYS_RESOURCE)
        start()

    with ThreadPoolExecutor(max_workers=1) as starter:
        starter.submit(begin).result()


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
        while remove_dead_mount(place_of(share)):
            log.warning("removed from %s the mount of a daemon that was killed while it served in place", share)
    except MountError as error:
        raise UsageError(
            f"{share} is a mount of ours already, a guest's or that of a daemon which serves in place: end that one first"
        ) from error
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

"""Advisory locks of the users of a mount, as locks of the files below: they hold against everybody else who locks those.

1. A flock belongs to an open file, which the kernel calls a file handle. It becomes a flock of the handle's own descriptor,
   and ends with it.
2. The owner of a fcntl lock is a number that the kernel chooses: of a process, or for an OFD lock of an open file; it does not
   say which. Each owner has one open file description of its own below, for each file, and its locks are OFD locks of
   that. So owners exclude each other and not themselves, whichever descriptors they lock through, and whoever serves them.
3. An owner's locks on a file end when FLUSH comes with its number: a process has closed some descriptor of the file. Those
   of an open file end when its handle is released. That comes some time after the closing, and the number may be in use
   again by then; so of every locked byte it is known through which handle it was locked.
4. A description that only reads cannot take an exclusive lock. When a handle that writes is used, it is replaced by one that
   can: that first takes the same locks, all of them shared, so there is no moment without them.
5. A lock that ends with its handle is still there for a moment when close has returned. Who finds a lock in the way and does
   not want to wait is not told so before the handles of the file that were closed just now are released, or too long in it.
6. Whoever has to wait takes no lock of this module along, waits on a descriptor of its own, and begins anew if meanwhile the
   owner has left the description that this belongs to. What it gets counts when it is noted under the owner's lock.

Source: fcntl(2), flock(2), fs/fuse/file.c.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from coherency.fuse import syscalls
from coherency.fuse.codec import Request
from coherency.fuse.waits import Wait, Waits
from coherency.ids import NodeId

if TYPE_CHECKING:
    from coherency.fuse.tree import OpenFile

_SECOND_NS: Final = 1_000_000_000
OFFSET_MAX: Final = syscalls.OFFSET_MAX
_FLOCK: Final = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}
_MOST_PIECES: Final = 1 << 16
"""Of one owner in one file. More is ENOLCK."""
_RELEASED_WITHIN_NS: Final = 100_000_000
"""A handle is not closed if it takes longer: somebody has a copy of the descriptor."""
_start: Final = attrgetter("start")
_end: Final = attrgetter("end")


class Piece(NamedTuple):
    """Bytes ``start`` to ``end``, both included, and how they are locked: ``kind`` is F_RDLCK, F_WRLCK, or F_UNLCK."""

    start: int
    end: int
    kind: int
    fh: int  # through which file handle
    pid: int  # of which process, in the numbers of whoever has mounted

    def is_like(self, other: Piece) -> bool:
        return self[2:] == other[2:]


class Pieces:
    """What one owner has locked of one file: pieces that do not overlap, in order."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, new: Piece) -> None:
        """Its bytes are locked like this from now on, or with F_UNLCK not any more."""
        pieces = self._pieces
        first = bisect_left(pieces, new.start, key=_end)
        last = bisect_right(pieces, new.end, key=_start)
        run = pieces[max(first - 1, 0) : first]
        if first < last and pieces[first].start < new.start:
            run.append(pieces[first]._replace(end=new.start - 1))
        if new.kind != fcntl.F_UNLCK:
            run.append(new)
        if first < last and pieces[last - 1].end > new.end:
            run.append(pieces[last - 1]._replace(start=new.end + 1))
        run += pieces[last : last + 1]
        pieces[max(first - 1, 0) : last + 1] = _joined(run)

    def would_split(self, new: Piece) -> bool:
        """Whether something of one piece is left on both sides."""
        around = self.at(new.start)
        return around is not None and around.start < new.start and new.end < around.end

    def at(self, offset: int) -> Piece | None:
        """The piece that this byte is in."""
        index = bisect_left(self._pieces, offset, key=_end)
        return self._pieces[index] if index < len(self._pieces) and self._pieces[index].start <= offset else None


def _joined(run: list[Piece]) -> list[Piece]:
    """The same with what is adjacent and alike in one piece."""
    joined: list[Piece] = []
    for piece in run:
        if joined and joined[-1].end + 1 == piece.start and joined[-1].is_like(piece):
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return joined


class _Owner:
    """One owner and one file. Everything under ``lock``; nothing is done with one that is ``gone``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.fd = -1
        self.descriptions = 0  # so many it has left
        self.writes = self.gone = False
        self.pieces = Pieces()
        self.handles: set[int] = set()
        self.waits: set[Wait] = set()

    def open_for(self, file: OpenFile) -> None:
        """Have a description that can take every lock that ``file`` may ask for (rule 4)."""
        writes = file.flags & os.O_ACCMODE != os.O_RDONLY
        if self.fd >= 0 and (self.writes or not writes):
            return
        # Some files can only be opened to append: chattr(1).
        fd = _open_again(file.fd, os.O_RDWR | file.flags & os.O_APPEND if writes else os.O_RDONLY)
        try:
            for start, end, kind, _, _ in self.pieces:
                syscalls.lock(fd, fcntl.F_OFD_SETLK, kind, start, end)
        except BaseException:
            os.close(fd)
            raise
        self._leave_description()
        self.fd, self.writes = fd, writes

    def set(self, piece: Piece) -> bool:
        """False if somebody else has locked some of it."""
        if len(self.pieces) >= _MOST_PIECES and (piece.kind != fcntl.F_UNLCK or self.pieces.would_split(piece)):
            raise OSError(errno.ENOLCK, f"one owner has locked {_MOST_PIECES} pieces of one file")
        return self.take(piece)

    def take(self, piece: Piece) -> bool:
        """The same, however many pieces it has locked."""
        try:
            syscalls.lock(self.fd, fcntl.F_OFD_SETLK, piece.kind, piece.start, piece.end)
        except (BlockingIOError, PermissionError):  # fcntl(2) allows both
            return False
        self.pieces.put(piece)
        return True

    def unlock_of(self, fh: int) -> None:
        """Nothing is locked through this handle any more."""
        for piece in [piece for piece in self.pieces if piece.fh == fh]:
            with contextlib.suppress(OSError):  # its server is gone, and the lock with it
                self.set(piece._replace(kind=fcntl.F_UNLCK))

    def end(self) -> None:
        """Nothing is locked any more when this returns. Not just closed: that would reach a server below later."""
        self.gone = True
        self._leave_description()

    def _leave_description(self) -> None:
        if self.fd >= 0:
            _unlock(self.fd)
            os.close(self.fd)
            self.fd = -1
        self.descriptions += 1
        for wait in self.waits:
            wait.kick()


def _open_again(fd: int, flags: int) -> int:
    if fd < 0:
        raise OSError(errno.EBADF, "nothing is open below")
    try:
        return os.open(syscalls.proc_path(fd), flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # no answer to somebody who has a descriptor
            raise OSError(errno.ENOLCK, "no descriptor is left for another owner of locks") from error
        raise


def _unlock(fd: int) -> None:
    with contextlib.suppress(OSError):  # its server is gone, and the lock with it
        syscalls.lock(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, 0, OFFSET_MAX)


@dataclass(frozen=True)
class LockStatistics:
    owners: int  # of fcntl locks, one for each file
    waiting: int


class Locks:
    """All locks of the users of one mount. Thread-safe."""

    def __init__(self, most_waits: int) -> None:
        self._lock = threading.Lock()
        self._owners: dict[tuple[NodeId, int], _Owner] = {}
        self._closing: dict[int, tuple[NodeId, int]] = {}  # by handle: of which file, and when
        self._released = threading.Condition()
        self._waits = Waits(most_waits)

    # ---- fcntl locks ----

    def find(self, file: OpenFile, owner_id: int, wanted: Piece) -> Piece | None:
        """A lock of somebody else that stands in the way of ``wanted``; its pid is 0 unless that is a user of this mount."""
        owner = self._owners.get((file.node.id, owner_id))
        with contextlib.ExitStack() as undo:
            fd = file.fd  # which has no fcntl locks itself: everybody's stand in its way
            if owner is not None:
                undo.enter_context(owner.lock)
                fd = owner.fd if owner.fd >= 0 else fd
            kind, start, end = syscalls.lock(fd, fcntl.F_OFD_GETLK, wanted.kind, wanted.start, wanted.end)
        if kind == fcntl.F_UNLCK:
            return None
        return Piece(start, end, kind, 0, self._holder(file.node.id, start, kind))

    def _holder(self, node_id: NodeId, offset: int, kind: int) -> int:
        with self._lock:
            owners = [owner for (node, _), owner in self._owners.items() if node == node_id]
        for owner in owners:
            with owner.lock:
                piece = owner.pieces.at(offset)
            if piece is not None and piece.kind == kind:
                return piece.pid
        return 0

    def set(self, request: Request, file: OpenFile, owner_id: int, wanted: Piece, *, wait: bool) -> None:
        """Lock or unlock. ``BlockingIOError`` if somebody else has locked it, unless it is waited for.

        ``InterruptedError`` if the caller gives up waiting; nothing has changed then. ENOLCK if too many wait.
        """
        if wanted.kind == fcntl.F_UNLCK:
            owner = self._owners.get((file.node.id, owner_id))
            if owner is not None:
                with owner.lock:
                    if owner.fd >= 0:
                        owner.set(wanted)
            return
        if self._attempt(file, owner_id, wanted):
            return
        if not wait:
            if self._has_let_go(file.node.id) and self._attempt(file, owner_id, wanted):
                return
            raise BlockingIOError(errno.EAGAIN, "locked by somebody else")
        with self._waits.begin(request) as waiting:
            while not self._wait_for(file, owner_id, wanted, waiting):
                pass

    def _attempt(self, file: OpenFile, owner_id: int, wanted: Piece) -> bool:
        with self._owner(file, owner_id, wanted.fh) as owner:
            return owner.set(wanted)

    @contextlib.contextmanager
    def _owner(self, file: OpenFile, owner_id: int, fh: int) -> Iterator[_Owner]:
        """The owner, who may be new, under its lock, and good for what ``file`` may ask for."""
        key = file.node.id, owner_id
        while True:
            with self._lock:
                owner = self._owners.setdefault(key, _Owner())
            with owner.lock:
                if not owner.gone:
                    file.lock_owners.add(owner_id)
                    owner.handles.add(fh)
                    owner.open_for(file)
                    yield owner
                    return
            self._forget(key, owner)

    def _forget(self, key: tuple[NodeId, int], owner: _Owner) -> None:
        with self._lock:
            if self._owners.get(key) is owner:
                del self._owners[key]

    def _wait_for(self, file: OpenFile, owner_id: int, wanted: Piece, waiting: Wait) -> bool:
        """False if something has come in between (rule 6)."""
        with self._owner(file, owner_id, wanted.fh) as owner:
            waiting.arm()
            mine, description = os.dup(owner.fd), owner.descriptions
            owner.waits.add(waiting)
        try:
            granted = waiting.call(
                partial(syscalls.lock, mine, fcntl.F_OFD_SETLKW, wanted.kind, wanted.start, wanted.end)
            )
            with owner.lock:
                if owner.descriptions == description:  # once more: another thread may have unlocked it meanwhile
                    return granted and owner.take(wanted)
            if granted:
                _unlock(mine)
            return False
        finally:
            with owner.lock:
                owner.waits.discard(waiting)
            os.close(mine)

    def _has_let_go(self, node_id: NodeId) -> bool:
        """Whether somebody may have, since he seemed to be about to (rule 5)."""
        with self._released:
            since_ns = time.monotonic_ns() - _RELEASED_WITHIN_NS
            closing = {fh for fh, (node, at_ns) in self._closing.items() if node == node_id and at_ns > since_ns}
            self._released.wait_for(lambda: closing.isdisjoint(self._closing), _RELEASED_WITHIN_NS / _SECOND_NS)
        return bool(closing)

    def flushed(self, file: OpenFile, fh: int, owner_id: int) -> None:
        """The owner has closed a descriptor of the file: it has no locks on it when this returns (rule 3)."""
        with self._released:
            self._closing[fh] = file.node.id, time.monotonic_ns()
        key = file.node.id, owner_id
        owner = self._owners.get(key)
        if owner is not None:
            with owner.lock:
                owner.end()
            self._forget(key, owner)

    def released(self, file: OpenFile, fh: int) -> None:
        """The handle is gone: no fcntl lock is held through it when this returns (rule 3)."""
        for owner_id in file.lock_owners:
            key = file.node.id, owner_id
            owner = self._owners.get(key)
            if owner is None:
                continue
            with owner.lock:
                if owner.gone or fh not in owner.handles:
                    continue
                owner.handles.discard(fh)
                if owner.handles:
                    owner.unlock_of(fh)
                    continue
                owner.end()
            self._forget(key, owner)

    def closed(self, fh: int) -> None:
        """Neither is a flock: its descriptor is closed."""
        with self._released:
            if self._closing.pop(fh, None) is not None:
                self._released.notify_all()

    # ---- flock ----

    def flock(self, request: Request, file: OpenFile, kind: int, *, wait: bool) -> None:
        """Like :meth:`set`, for a whole file. As everywhere, who converts a lock and has to wait has let go of the old one."""
        attempt: Callable[[], None] = partial(syscalls.flock, file.fd, _FLOCK[kind] | fcntl.LOCK_NB)
        try:
            attempt()
        except BlockingIOError:
            pass
        else:
            return
        if not wait:
            self._has_let_go(file.node.id)
            attempt()
            return
        lock: Callable[[], None] = partial(syscalls.flock, file.fd, _FLOCK[kind])
        with self._waits.begin(request) as waiting:
            waiting.arm()
            while not waiting.call(lock):
                waiting.arm()

    # ---- all of them ----

    def end(self) -> None:
        """The files below are not there any more: all owners of fcntl locks have lost them."""
        with self._lock:
            owners = list(self._owners.values())
            self._owners.clear()
        for owner in owners:
            with owner.lock:
                owner.end()

    def statistics(self) -> LockStatistics:
        with self._lock:
            return LockStatistics(len(self._owners), len(self._waits))

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self._lock:
            owners = list(self._owners.values())
        for owner in owners:
            with owner.lock:
                pieces = list(owner.pieces)
                assert all(piece.start <= piece.end for piece in pieces), pieces
                assert all(one.end < other.start for one, other in pairwise(pieces)), pieces
                assert {piece.fh for piece in pieces} <= owner.handles, pieces
                assert owner.writes or all(piece.kind == fcntl.F_RDLCK for piece in pieces), pieces

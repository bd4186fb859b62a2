"""A passthrough mounted by itself, in a process of its own that a test asks questions over a pipe.

    python -m tests.passthrough_server DIRECTORY MOUNTPOINT OPTIONS

OPTIONS are :class:`Options` as JSON. One line of JSON per question, ``[method, arguments]``, and one per answer,
``[result, error]``; the end of standard input unmounts and ends.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from coherency.daemon.changes import Changes
from coherency.daemon.export import Export
from coherency.daemon.holds import Hold
from coherency.fuse import syscalls
from coherency.fuse.abi import InitFlag
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import Deferred, Reply, Session
from coherency.fuse.tree import KernelCache
from coherency.ids import HostInode, NodeId
from coherency.shm_table import TableWriter, bytes_needed

log = logging.getLogger(__name__)

GATE = b"gate-"


@dataclass(frozen=True)
class Options:
    descriptor_limit: int = 10_000
    kernel_cache: dict[str, Any] = field(default_factory=dict)  # of KernelCache
    handles: bool = True  # false: as on a file system that has none
    max_threads: int = 64
    open_files: int | None = None  # RLIMIT_NOFILE
    hold_s: float | None = None  # serve an export instead, which allows no change for so long


class Gated(Passthrough):
    """Looking up ``gate-…`` waits until the gate is opened, and answers that there is no such name."""

    def __init__(self, root: int, **options: Any) -> None:
        super().__init__(root, **options)
        self.gate = threading.Event()
        self.waiting = 0
        self._lock = threading.Lock()

    def lookup(self, request: Request) -> Reply | Deferred:
        if request.body.name.startswith(GATE):
            with self._lock:
                self.waiting += 1
            self.gate.wait()
            with self._lock:
                self.waiting -= 1
            raise FileNotFoundError(2, "the gate is open")
        return super().lookup(request)


class Server:
    """What can be asked: every method."""

    def __init__(self, directory: str, mountpoint: str, options: Options) -> None:
        if not options.handles:
            syscalls.file_handle = lambda fd: None
        if options.open_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (options.open_files, options.open_files))
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file_system: Passthrough
        if options.hold_s is not None:
            words = memoryview(bytearray(bytes_needed(1024))).cast("Q")
            table = TableWriter.create(words, slot_count=1024, table_id=(1, 2))
            hold_until_ns = time.monotonic_ns() + int(options.hold_s * 1e9)
            self._file_system = Export(
                root, Changes(table, hold=Hold(hold_until_ns)), descriptor_limit=options.descriptor_limit
            )
        else:
            self._file_system = Gated(
                root,
                descriptor_limit=options.descriptor_limit,
                kernel_cache=KernelCache(**options.kernel_cache),
            )
        self._session = Session.mount(
            mountpoint, self._file_system, source="coherency:test", name="test", max_threads=options.max_threads
        )
        self._session.start()

    def statistics(self) -> dict[str, int]:
        session = asdict(self._session.statistics())
        nodes = asdict(self._file_system.nodes.statistics())
        mine = {
            "open_files": len(self._file_system._files),
            "process_descriptors": len(os.listdir("/proc/self/fd")) - 1,
            "connection": self._session.connection,
        }
        return {**session, **nodes, **mine}

    def check(self) -> None:
        self._session.check()
        self._file_system.nodes.check()

    def init_flags(self) -> int:
        return int(self._session.init_flags)

    def offers(self, name: str) -> bool:
        return InitFlag[name] in self._session.init_flags

    def node_of(self, ino: int) -> int:
        """The id of the node of an inode of the directory."""
        nodes = self._file_system.nodes
        return nodes._by_key[nodes.root_device, HostInode(ino)].id

    def waiting(self) -> int:
        assert isinstance(self._file_system, Gated)
        return self._file_system.waiting

    def open_gate(self) -> None:
        assert isinstance(self._file_system, Gated)
        self._file_system.gate.set()

    def open_gate_later(self, after_s: float) -> None:
        threading.Timer(after_s, self.open_gate).start()

    def invalidate_inode(self, node: int, offset: int = -1, length: int = 0) -> bool:
        return self._session.invalidate_inode(NodeId(node), offset, length)

    def invalidate_entry(self, parent: int, name: str, expire_only: bool = False) -> bool:
        return self._session.invalidate_entry(NodeId(parent), os.fsencode(name), expire_only=expire_only)

    def is_unknown(self) -> bool:
        return self._session.is_unknown()

    def is_gone(self) -> bool:
        return self._session.is_gone

    def increment_epoch(self) -> bool:
        return self._session.increment_epoch()

    def close(self) -> None:
        self._session.close()

    def is_over(self, within_s: float = 0) -> bool:
        return self._session.wait(within_s)


def main() -> None:
    directory, mountpoint, options = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    answer_questions(Server(directory, mountpoint, Options(**json.loads(options))))


def answer_questions(server: Any) -> None:
    """Until the end of standard input: every method of ``server`` is a question, and ``close`` comes last."""
    _say(None, None)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            result = getattr(server, method)(*arguments)
        except Exception as error:
            log.exception("question %s failed", method)
            _say(None, repr(error))
        else:
            _say(result, None)
    server.close()


def _say(result: Any, error: str | None) -> None:
    sys.stdout.write(json.dumps([result, error]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

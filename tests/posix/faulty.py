"""A passthrough with faults to be chosen, each of which a scenario must find: the suite's negative controls.

    python -m tests.posix.faulty DIRECTORY MOUNTPOINT OPTIONS

Asked like `tests.passthrough_server`.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coherency.fuse import syscalls
from coherency.fuse.abi import SetattrValid
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.replies import DirectoryEntry
from coherency.fuse.session import Reply, Session
from coherency.fuse.tree import OpenFile
from tests.passthrough_server import answer_questions


@dataclass(frozen=True)
class Options:
    pass


def with_body(request: Request, **fields: Any) -> Request:
    request.body = request.body._replace(**fields)
    return request


class Faulty(Passthrough):
    """One fault at a time; "" is none."""

    fault = ""

    def _make(self, request: Request, umask: int, name: bytes, kind: int, create: Callable[[int], None]) -> Reply:
        if self.fault == "ignores the umask":
            umask = 0
        if self.fault == "makes all for root's group":
            request.gid = 0
        return super()._make(request, umask, name, kind, create)

    def create(self, request: Request) -> Reply:
        if self.fault == "ignores the umask":
            with_body(request, umask=0)
        return super().create(request)

    def rename(self, request: Request) -> Reply:
        if self.fault == "renames instead of exchanging":
            with_body(request, flags=0)
        return super().rename(request)

    def write(self, request: Request) -> Reply:
        file = self.file(request.body.fh)
        before = os.fstat(file.fd)
        if self.fault == "keeps set-id bits":
            with_body(request, write_flags=0)
        reply = super().write(request)
        if self.fault == "keeps the time of the content":
            os.utime(file.fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        return reply

    def setattr(self, request: Request) -> Reply:
        body = request.body
        if self.fault == "keeps set-id bits":
            with_body(request, valid=body.valid & ~SetattrValid.KILL_SUIDGID)
        if self.fault == "sets omitted times" and body.valid & SetattrValid.MTIME:
            with_body(request, valid=body.valid | SetattrValid.ATIME, atime=body.mtime)
        if self.fault == "has no times before 1970" and body.valid & SetattrValid.MTIME and body.mtime[0] < 0:
            with_body(request, mtime=(0, 0))
        if self.fault == "cuts files off in blocks" and body.valid & SetattrValid.SIZE:
            with_body(request, size=(body.size + 4095) // 4096 * 4096)
        return super().setattr(request)

    def _drop_set_ids_for(self, request: Request, file: OpenFile) -> None:
        if self.fault != "keeps set-id bits":
            super()._drop_set_ids_for(request, file)

    def unlink(self, request: Request) -> Reply:
        reply = super().unlink(request)
        if self.fault == "loses files without names":
            for file in self._files.values():
                if file.node.kind == stat.S_IFREG and os.fstat(file.fd).st_nlink == 0:
                    os.truncate(syscalls.proc_path(file.fd), 0)
        return reply

    def link(self, request: Request) -> Reply:
        if self.fault == "copies instead of linking":
            parent, target = self.nodes.get(request.node), self.nodes.get(request.body.target)
            with self.nodes.open(parent) as at, self.nodes.open(target):
                os.close(os.open(request.body.name, os.O_CREAT | os.O_EXCL, dir_fd=at))
                return (self.entry(*self.look_up(parent, at, request.body.name)),)
        return super().link(request)

    def setxattr(self, request: Request) -> Reply:
        if self.fault == "sets attributes whatever is there":
            with_body(request, flags=0)
        return super().setxattr(request)

    def listxattr(self, request: Request) -> Reply:
        if self.fault == "shows trusted attributes to all":
            request.uid = 0
        return super().listxattr(request)

    def _entries(self, *arguments: Any) -> list[DirectoryEntry]:
        entries = super()._entries(*arguments)
        if self.fault == "lists some entries twice" and len(entries) > 50:
            return entries[:50] + entries[49:]
        if self.fault == "does not list some entries" and len(entries) > 50:
            return entries[:49] + entries[50:]
        return entries

    def _writer(self, file: OpenFile, *, appends: bool) -> int:
        return super()._writer(file, appends=appends and self.fault != "believes the kernel's offset")


class Server:
    def __init__(self, directory: str, mountpoint: str) -> None:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file_system = Faulty(root, descriptor_limit=10_000)
        self._session = Session.mount(mountpoint, self._file_system, source="coherency:test", name="faulty")
        self._session.start()

    def have(self, fault: str) -> None:
        self._file_system.fault = fault

    def close(self) -> None:
        self._session.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    answer_questions(Server(*sys.argv[1:3]))

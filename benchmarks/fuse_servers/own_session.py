"""One file, served by ``coherency.fuse.session`` with all its threads and bookkeeping.

    own_session.py ordinary|quick|alone MOUNTPOINT

ordinary: an operation, as the daemon's export and a guest that must fetch. quick: a quick operation, as a guest in mode
access whose versions agree. alone: ordinary, but with a single thread, so that nothing is handed over; a real mount could
hang with it. All encode their answer anew each time, as if they had just called ``os.fstat``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from coherency.fuse import replies
from coherency.fuse.abi import ROOT_ID, InitFlag, Opcode
from coherency.fuse.codec import Request
from coherency.fuse.session import NO_REPLY, Operation, QuickOperation, Reply, Session
from coherency.ids import HostInode, NodeId

FILE_ID = 2


class OneFile:
    def __init__(self, *, quick: bool) -> None:
        self.init_flags = InitFlag(0)
        self._quick = quick
        self._status = {ROOT_ID: os.stat("/"), FILE_ID: os.stat(__file__)}

    @property
    def operations(self) -> Mapping[int, Operation]:
        return {
            Opcode.LOOKUP: self.lookup,
            Opcode.GETATTR: self.getattr,
            Opcode.OPEN: lambda request: (replies.encode_open(1),),
            Opcode.FLUSH: lambda request: (),
            Opcode.RELEASE: lambda request: (),
            Opcode.FORGET: lambda request: NO_REPLY,
        }

    @property
    def quick_operations(self) -> Mapping[int, QuickOperation]:
        return {int(Opcode.GETATTR): lambda node, body, pid: self._attr_out(node)} if self._quick else {}

    def lookup(self, request: Request) -> Reply:
        return (replies.encode_entry(NodeId(FILE_ID), self._attributes(FILE_ID)),)

    def getattr(self, request: Request) -> Reply:
        return (self._attr_out(request.node),)

    def _attr_out(self, node: int) -> bytes:
        return replies.encode_attr_out(self._attributes(node))

    def _attributes(self, node: int) -> bytes:
        return replies.encode_attr(self._status[node], HostInode(node))

    def close(self) -> None:
        pass


def main() -> None:
    kind, mountpoint = sys.argv[1:]
    max_threads = 1 if kind == "alone" else 64
    session = Session.mount(mountpoint, OneFile(quick=kind == "quick"), source="own_session", max_threads=max_threads)
    session.start()
    session.wait()


if __name__ == "__main__":
    main()

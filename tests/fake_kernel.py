"""The kernel's end of a FUSE connection, played by a test: any request in any order, also those no kernel would send."""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import NamedTuple, Self

from coherency.fuse.session import FileSystem, Session
from tests.fuse_header import header
from tests.fuse_messages import request

ANSWER_TIMEOUT_S = 20.0
_MESSAGE_BYTES = 1 << 20


class Answer(NamedTuple):
    unique: int
    error: int  # an errno, positive
    payload: bytes

    def read(self, struct: str, offset: int = 0) -> dict[str, int]:
        """The fields of a struct in the payload."""
        layout = header().layouts[struct]
        return layout.unpack(self.payload[offset : offset + layout.size])


class FakeKernel:
    """Serves ``file_system`` without a mount. A context manager that ends the connection and waits for its threads."""

    def __init__(self, file_system: FileSystem, *, max_threads: int = 64) -> None:
        # Like the device, this keeps the messages apart.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        self.session = Session(theirs.detach(), "/nowhere", file_system, name="fake", max_threads=max_threads)
        self.session._setxattr_ext = True  # as agreed on with every kernel since 5.14
        self._unique = 0

    def __enter__(self) -> Self:
        self.session._start_thread()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_WR)
        assert self.session.wait(ANSWER_TIMEOUT_S), "the session does not end"
        self._socket.close()

    def new_unique(self) -> int:
        self._unique += 2  # odd numbers are those of INTERRUPT
        return self._unique

    def send(self, data: bytes) -> None:
        self._socket.send(data)

    def receive(self) -> Answer:
        """The next reply, or notification (unique 0)."""
        data = self._socket.recv(_MESSAGE_BYTES)
        layout = header().layouts["out_header"]
        head = layout.unpack(data[: layout.size])
        assert head["len"] == len(data)
        return Answer(head["unique"], -head["error"], data[layout.size :])

    def ask(
        self, kind: str, tail: bytes = b"", *, node: int = 1, caller: tuple[int, int] = (0, 0), **fields: int
    ) -> Answer:
        """One request, as root and of the root directory unless told otherwise, and its reply."""
        unique = self.new_unique()
        self.send(request(kind, tail, unique=unique, node=node, caller=caller, pid=os.getpid(), **fields))
        answer = self.receive()
        assert answer.unique == unique
        return answer

"""A passthrough that fails as it is told, as a disk does: served like ``tests.passthrough_server``."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import Deferred, Operation, Reply, Session
from tests.passthrough_server import answer_questions


@dataclass(frozen=True)
class Options:
    pass


class Failing(Passthrough):
    """Requests in ``failing`` end with their errno, without anything done."""

    failing: Mapping[int, int] = {}

    @property
    def operations(self) -> Mapping[int, Operation]:
        return {opcode: self._unless_failing(operation) for opcode, operation in super().operations.items()}

    def _unless_failing(self, operation: Operation) -> Operation:
        def answer(request: Request) -> Reply | Deferred:
            number = self.failing.get(request.opcode)
            if number and (request.opcode != Opcode.OPEN or request.body.flags & os.O_TRUNC):
                raise OSError(number, "as it was told")
            return operation(request)

        return answer


class Server:
    """What can be asked."""

    def __init__(self, directory: str, mountpoint: str, _options: Options) -> None:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files = Failing(root, descriptor_limit=10_000)
        self._session = Session.mount(mountpoint, self._files, source="coherency:test", name="failing")
        self._session.start()

    def fail(self, opcodes: list[str], number: int) -> None:
        """These fail from now on, and no others. OPEN only where it changes something, with O_TRUNC."""
        self._files.failing = {Opcode[name]: number for name in opcodes}

    def close(self) -> None:
        self._session.close()


def main() -> None:
    directory, mountpoint, options = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    answer_questions(Server(directory, mountpoint, Options(**json.loads(options))))


if __name__ == "__main__":
    main()

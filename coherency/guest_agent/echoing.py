"""A guest's file system whose programs are shown what others do: requests of the process that echoes are answered by ``echoes``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from coherency.fuse.abi import InitFlag
from coherency.fuse.codec import Request
from coherency.fuse.session import Deferred, FileSystem, Operation, QuickOperation, Reply


class Answering(Protocol):
    """Who answers them; see ``echoes.Echoes``."""

    def is_helper(self, pid: int) -> bool: ...
    def answer(self, request: Request) -> Reply: ...


class Echoing:
    """Stands before a file system, for everybody else."""

    def __init__(self, file_system: FileSystem, echoes: Answering) -> None:
        self._file_system, self._echoes = file_system, echoes

    @property
    def operations(self) -> Mapping[int, Operation]:
        return {opcode: self._unless_echo(operation) for opcode, operation in self._file_system.operations.items()}

    @property
    def quick_operations(self) -> Mapping[int, QuickOperation]:
        return {opcode: self._unless_quick_echo(each) for opcode, each in self._file_system.quick_operations.items()}

    @property
    def init_flags(self) -> InitFlag:
        return self._file_system.init_flags

    def close(self) -> None:
        self._file_system.close()

    def _unless_echo(self, operation: Operation) -> Operation:
        echoes = self._echoes

        def answer(request: Request) -> Reply | Deferred:
            return echoes.answer(request) if echoes.is_helper(request.pid) else operation(request)

        return answer

    def _unless_quick_echo(self, operation: QuickOperation) -> QuickOperation:
        is_helper = self._echoes.is_helper

        def answer(node: int, body: memoryview, pid: int) -> bytes | int | Deferred | None:
            return None if is_helper(pid) else operation(node, body, pid)

        return answer

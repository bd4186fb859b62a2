"""Pickles, one after the other, each with its length before it: what host and guest say to each other."""

import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_LENGTH = struct.Struct(">I")


class Request(NamedTuple):
    """Call `function(*arguments)` and send back what comes of it, under the same number."""

    number: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Answer(NamedTuple):
    """What the function has returned, or else what it has raised."""

    number: int
    value: Any
    problem: BaseException | None


READY = Answer(0, "ready", None)
"""What the guest says first."""


def pack(message: Request | Answer) -> bytes:
    body = pickle.dumps(message)
    return _LENGTH.pack(len(body)) + body


def messages(read: Callable[[int], bytes]) -> Iterator[Any]:
    """All that come, until `read(size)` returns nothing."""
    buffer = b""
    while data := read(1 << 16):
        buffer += data
        while len(buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer)
            end = _LENGTH.size + length
            if len(buffer) < end:
                break
            yield pickle.loads(buffer[_LENGTH.size : end])
            buffer = buffer[end:]

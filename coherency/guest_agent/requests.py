"""What one asks a daemon without being its guest: a status, a new epoch, and which names there are."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from coherency.errors import MessageError, UsageError
from coherency.guest_agent.channel import Channel
from coherency.ids import Epoch
from coherency.leases import LONGEST_LEASE_NS
from coherency.protocol import (
    EvictReply,
    EvictRequest,
    GuestReport,
    Invalidated,
    InvalidateRequest,
    Message,
    StatusReply,
    StatusRequest,
    encode,
)
from coherency.rendezvous import CONTROL_SOCKET_NAME

Answer = TypeVar("Answer")

Status = dict[str, Any]
"""The daemon's report (`REPORT_KEYS` and more), and under "guests" a list with the fields of each GuestReport."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a guest or an operator waits for what; what happens then stands in `docs/spec/control.md`."""

    answer_ns: int = 5_000_000_000
    first_retry_ns: int = 100_000_000
    line_settles_ns: int = 3_000_000_000
    last_retry_ns: int = 2_000_000_000
    invalidation_ns: int = LONGEST_LEASE_NS + 5_000_000_000


def fetch_status(runtime_root: Path, name: str, *, patience: Patience | None = None) -> Status:
    """Ask the daemon of `name` how it and its guests are.

    Raises `DaemonUnavailable` if nobody serves the name, `Refused`, `UsageError`, `PeerError`.
    """
    deadline_ns = time.monotonic_ns() + (patience or Patience()).answer_ns
    with contextlib.closing(Channel.dial(runtime_root, name, deadline_ns=deadline_ns)) as channel:
        channel.ask(StatusRequest())
        guests = []
        while isinstance(message := channel.answer(deadline_ns), GuestReport):
            guests.append(message)
        return status_of(require(StatusReply, message), guests)


def invalidate(runtime_root: Path, name: str, *, patience: Patience | None = None) -> Epoch:
    """Make the daemon of `name` begin a new epoch, so that every guest distrusts all that it has.  Returns the epoch.

    Waits until the kernels of guests have forgotten, too, which takes one lease if one of them does not answer.
    Raises like `fetch_status`; `Refused` if this user is neither root nor the daemon's.
    """
    patience = patience or Patience()
    began_ns = time.monotonic_ns()
    with contextlib.closing(Channel.dial(runtime_root, name, deadline_ns=began_ns + patience.answer_ns)) as channel:
        deadline_ns = began_ns + patience.invalidation_ns
        channel.ask(InvalidateRequest())
        return Epoch(require(Invalidated, channel.answer(deadline_ns)).epoch)


def evict(runtime_root: Path, name: str, guest: str, *, patience: Patience | None = None) -> int:
    """Make the daemon of `name` send a guest away: all of this name, or the one with this id.  Returns how many.

    Waits until their kernels have forgotten what they were granted, which takes one lease if they do not answer.
    Raises like `invalidate`; `Refused` also if there is no such guest.
    """
    patience = patience or Patience()
    began_ns = time.monotonic_ns()
    request = EvictRequest(guest)
    try:
        encode(request)
    except ValueError as error:
        raise UsageError(str(error)) from None
    with contextlib.closing(Channel.dial(runtime_root, name, deadline_ns=began_ns + patience.answer_ns)) as channel:
        channel.ask(request)
        return require(EvictReply, channel.answer(began_ns + patience.invalidation_ns)).guests


def served_names(runtime_root: Path) -> list[str]:
    """The names in `runtime_root` that have a control socket, or may have one, sorted.  Whether anybody listens is not asked."""
    try:
        entries = os.listdir(runtime_root)
    except FileNotFoundError:
        return []
    return sorted(name for name in entries if _may_be_served(runtime_root / name))


def _may_be_served(directory: Path) -> bool:
    try:
        return (directory / CONTROL_SOCKET_NAME).is_socket()
    except PermissionError:
        return True  # others' daemons are not to be looked at: who asks them is told so


def require(kind: type[Answer], message: Message) -> Answer:
    """Return `message` if it is of this kind; raises `MessageError` otherwise."""
    if not isinstance(message, kind):
        raise MessageError(f"the daemon answered with {type(message).__name__} instead of {kind.__name__}")
    return message


def status_of(reply: StatusReply, guests: list[GuestReport]) -> Status:
    """Put a daemon's answer together."""
    return {**reply.report, "guests": [asdict(guest) for guest in guests]}

"""The guest as a sharer, on its control channel: leases, confirmations, recalls and their acks.

1. The lease counts from before the Hello or Renew was sent that the daemon has answered.
2. A recall is acked when the kernel has forgotten, never before; acks are cumulative, so nothing is acked while an earlier recall
   is not carried out. That is tried again at each ``tend``.
3. Once the connection is lost nothing is granted any more, and everything is recalled, before the next Hello says so.

All methods but ``attach`` and ``is_clean`` run on the client's thread, or before it has begun.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from coherency.guest_agent.channel import Channel
from coherency.guest_agent.grants import Grants
from coherency.guest_agent.recalls import FORGETS_LATE_S, Helpers, Recalls
from coherency.ids import GrantKey
from coherency.leases import RENEWALS_PER_LEASE
from coherency.protocol import Ack, Confirm, Evicted, Message, Recall, Renew, Renewed, Welcome

log = logging.getLogger(__name__)

_SWEEPS_PER_LEASE: Final = 1
_LAST_ATTEMPTS: Final = 4


class Sharer:
    """One guest's part in grants, for all its connections."""

    def __init__(self, grants: Grants, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.grants, self._clock_ns = grants, clock_ns
        self._recalls: Recalls | None = None
        self._helpers: Helpers | None = None
        self._sharing = threading.Lock()  # the helpers learn of the channel from two threads
        self._channel: Channel | None = None
        self._session = self._lease_ns = 0
        self._renewals: dict[int, int] = {}  # when each unanswered Renew was sent
        self._serial = 0
        self._renew_at_ns = self._sweep_at_ns = 0
        self._owed: list[tuple[GrantKey, ...]] = []  # recalls that are not carried out
        self._acked = self._recalled = 0

    def attach(self, recalls: Recalls, helpers: Helpers) -> None:
        """Before anything is granted: who makes the kernel forget."""
        with self._sharing:
            self._recalls, self._helpers = recalls, helpers
            self._share_channel()

    def _share_channel(self) -> None:
        if self._helpers is not None:
            self._helpers.share_channel(None if self._channel is None else self._channel.fileno())

    # ---- the connection ----

    def joined(self, welcome: Welcome, asked_at_ns: int, channel: Channel) -> None:
        """The daemon has answered the Hello that was sent after ``asked_at_ns``; what was granted before is forgotten."""
        self._session, self._lease_ns = welcome.session, welcome.lease_ns
        self._renewals.clear()
        self._owed.clear()
        self._acked = self._recalled = 0
        now_ns = self._clock_ns()
        self._renew_at_ns = now_ns + self._lease_ns // RENEWALS_PER_LEASE
        self._sweep_at_ns = now_ns + self._lease_ns // _SWEEPS_PER_LEASE
        self.grants.begin(welcome.session, welcome.lease_ns, asked_at_ns, channel.offer)
        with self._sharing:
            self._channel = channel
            self._share_channel()

    def lost(self) -> None:
        """The connection is gone, or given up; its channel is still open."""
        self.grants.end()
        with self._sharing:
            self._channel = None
            self._share_channel()
        self.is_clean()

    def is_clean(self) -> bool:
        """After ``lost``: whether the kernel has nothing any more of what was granted. Tries to bring that about."""
        if self._recalls is None or self._recalls.carry_out(()):
            return True
        return self._clock_ns() > self.grants.lapses_ns

    def wait_until_clean(self) -> None:
        """The same for who has stopped granting, from any thread: until it is so, or cannot be brought about soon."""
        for _ in range(_LAST_ATTEMPTS):
            if self.is_clean():
                return
        log.warning("the kernel may know names of the unmounted file system for up to %d s", self._lease_ns // 10**9)

    # ---- messages ----

    def handle(self, message: Message) -> str | None:
        """Act on a message of the daemon. Returns why the connection is of no use any more, if it is not."""
        channel = self._channel
        assert channel is not None
        if isinstance(message, Evicted):
            return "it has evicted this guest"
        if isinstance(message, Confirm):
            known = message.session == self._session and self.grants.confirm(message.serial, message.epoch)
            return None if known else "it confirms what was not asked for"
        if isinstance(message, Renewed):
            return self._renewed(message.serial)
        assert isinstance(message, Recall)
        if message.serial != self._recalled + 1:
            return f"recall {message.serial} follows recall {self._recalled}"
        self._recalled += 1
        if self._recalls is not None and self._recalls.danger == "ack-first":
            self._acked = message.serial
            self._ack(channel)
            time.sleep(FORGETS_LATE_S)
            self._recalls.carry_out(message.keys)
            return None
        self._owed.append(message.keys)
        return self._carry_out(channel)

    def _carry_out(self, channel: Channel) -> str | None:
        before = self._acked
        while self._owed:
            keys = self._owed[0]
            if self._recalls is None:  # nothing was granted yet, but it would be under keys that the daemon has struck out
                self.grants.revoke(keys) if keys else self.grants.revoke_everything()
            elif not self._recalls.carry_out(keys):
                break
            del self._owed[0]
            self._acked += 1
        return self._ack(channel) if self._acked > before else None

    def _ack(self, channel: Channel) -> str | None:
        try:
            channel.send(Ack(self._session, self._acked))
        except ConnectionError as error:
            return str(error)
        return None

    def _renewed(self, serial: int) -> str | None:
        if serial > self._serial:
            return "it renews what was not asked for"
        asked_at_ns = self._renewals.get(serial)
        for earlier in [each for each in self._renewals if each <= serial]:
            del self._renewals[earlier]
        if asked_at_ns is not None:  # else it comes too late
            self.grants.renew(asked_at_ns)
        return None

    def tend(self) -> str | None:
        """What is due; to be called several times per second. Returns like ``handle``."""
        channel, now_ns = self._channel, self._clock_ns()
        if channel is None:
            return None
        if self._owed and (trouble := self._carry_out(channel)):
            return trouble
        if now_ns >= self._renew_at_ns:
            self._renew_at_ns = now_ns + self._lease_ns // RENEWALS_PER_LEASE
            self._serial += 1
            self._renewals[self._serial] = now_ns
            if not channel.offer(Renew(self._session, self._serial)):
                del self._renewals[self._serial]
            while len(self._renewals) > 2 * RENEWALS_PER_LEASE:
                del self._renewals[min(self._renewals)]
        # A portion at a time, so that recalls do not wait for long.
        if now_ns >= self._sweep_at_ns and self._recalls is not None and not self._recalls.sweep():
            self._sweep_at_ns = now_ns + self._lease_ns // _SWEEPS_PER_LEASE
        return None

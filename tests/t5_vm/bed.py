"""The bed of this level: a host with a share, and two virtual machines that use it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.guests import Host
from tests.vm.guest import Guest
from tests.vm.machine import Share

NAMES = ("vm1", "vm2")
OTHER = {"vm1": "vm2", "vm2": "vm1"}
STOCK_MODES = ("none", "auto", "always")
LEASE_S = 5


class Bed:
    """A daemon with two machines as its guests, and a plain directory that both have by stock virtiofs in each of its modes.

    The table is a POSIX one, so that the machines survive the daemon. A test may end a machine: who needs both
    asks with `both_running` or `both_mounted`.
    """

    def __init__(self, host: Host, stock: Path) -> None:
        self.host, self.stock = host, stock
        self.guests: dict[str, Guest] = {}
        self._ends = {name: contextlib.ExitStack() for name in NAMES}

    @classmethod
    @contextlib.contextmanager
    def made(cls, directory: Path) -> Iterator[Bed]:
        """`directory`: short and empty."""
        stock = directory / "stock"
        stock.mkdir()
        with contextlib.ExitStack() as undo:
            host = Host(
                directory, "--table", "posix", "--lease", str(LEASE_S), name=f"vm-{os.getpid()}"
            )  # POSIX tables are the whole machine's
            bed = cls(undo.enter_context(host), stock)
            undo.callback(bed.end)
            bed.both_running()
            yield bed

    def both_running(self) -> None:
        """Boot what does not run, both at a time."""
        missing = [name for name in NAMES if name not in self.guests or not self.guests[name].machine.is_running]
        for name in missing:
            self._ends[name].close()
            self.guests[name] = self._ends[name].enter_context(self.another(name))
        for name in missing:
            self.guests[name].wait_until_ready()

    def both_mounted(self, mode: str) -> dict[str, Guest]:
        """Boot and mount what is not there, in a mode, both at a time; returns the guests."""
        self.both_running()
        for guest in self.guests.values():
            if guest.mode not in ("", mode):
                guest.end_agent()
        pending = {guest: guest.start_mount(mode) for guest in self.guests.values() if not guest.mode}
        for guest, each in pending.items():
            guest.mounted(each, mode)
        return self.guests

    def another(self, name: str) -> Guest:
        """A machine that does not run yet."""
        shares = [Share(mode, self.stock, mode) for mode in STOCK_MODES]
        return Guest(name, self.host.directory / name, self.host.runtime_dir, self.host.name, shares)

    def end(self) -> None:
        """Whatever runs is ended, from one instant to the next."""
        for each in self._ends.values():
            each.close()

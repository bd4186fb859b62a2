"""A daemon, guests and workers in processes of their own, in a temporary directory; and what can be done to them.

1. Everything is started through the command line, as a user would.
2. ``close`` leaves nothing behind, whatever happened before: no process, no mount, no file.
3. While a guest has no mount, nothing may be mistaken for it: what lies beneath its mount point makes every path of the
   workload fail with ENOTDIR, an error that no call gets otherwise.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self, TypeAlias

from coherency.errors import CoherencyError
from coherency.fuse import syscalls
from coherency.fuse.mounts import mounts
from coherency.rendezvous import CONTROL_SOCKET_NAME
from coherency.sim.calls import (
    ATTRIBUTE_FILES,
    COPY_SOURCE,
    DIRECTORIES,
    INITIAL_MODE,
    NAME_DIRECTORIES,
    PAGE_BYTES,
    XATTR,
    Scene,
)
from coherency.sim.faults import DEFAULT_LEASE_NS, FAULTS, Fault, patience_ns
from coherency.sim.history import Call, mtime_ns
from coherency.sim.plots import prepare_plots
from coherency.sim.relay import Relay
from coherency.sim.verdict import AUTO_TIMEOUT_NS, GRANTING, PROMISES, Promise
from coherency.sim.waits import Window
from coherency.sim.worker import Orders, endless_call

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 15.0
RECOVERY_TIMEOUT_S: Final = 20.0
ENDLESS_S: Final = 10.0
"""A call that has not returned so long, and two leases, after everything else is over does not return."""
_PROBE_EVERY_S: Final = 0.05
_NAME: Final = "sim"
_SECOND_NS: Final = 1_000_000_000
_LOG_TAIL_BYTES: Final = 2000
_NAMES_PER_GUEST: Final = 2
_TREES: Final = 2
_KEPT_FILES: Final = 2
_RACES: Final = 2
_Hold: TypeAlias = Callable[[], object]


# How many looks there are for each change: of the workers that mostly change, and of the others.
_LOOKS: Final = {"everything": (1, 30), "same-directory": (0, 4)}
WORKLOADS: Final = tuple(_LOOKS)
SERVE_DANGEROUSLY: Final = ("no-bumps", "no-recalls")
MOUNT_DANGEROUSLY: Final = ("ack-first", "inval-entry", "no-self-recall")


class Setup(NamedTuple):
    """What is simulated."""

    guests: int
    workers: int  # of each guest, half of which (but at least one) mostly change things
    cache: str
    seed: int
    workload: str = WORKLOADS[0]
    lease_ns: int = DEFAULT_LEASE_NS
    live_dangerously: str = ""
    has_relays: bool = False  # between agents and daemon, for faults of the channel

    @property
    def scene(self) -> Scene:
        """Races are for the modes that promise that they have an order."""
        races = _RACES if PROMISES[self.cache] is Promise.LINEARIZABLE else 0
        names = _NAMES_PER_GUEST * self.guests
        if self.workload == "same-directory":
            return Scene(names, races=races, has_attribute_files=False, directories=NAME_DIRECTORIES[:1])
        return Scene(names, _TREES, _KEPT_FILES, races)

    @property
    def known_lease_ns(self) -> int:
        """0 in modes that know none."""
        return self.lease_ns if self.cache in GRANTING else 0


class NotRecovered(CoherencyError):
    """After a fault something did not work again in time. The catcher reports it like a broken promise."""


class Machine:
    """See the module. A context manager; not for several threads."""

    def __init__(self, setup: Setup, tell: Callable[[str], None]) -> None:
        self.setup, self._tell = setup, tell
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self._relays: dict[int, Relay] = {}
        self._recovery_s = RECOVERY_TIMEOUT_S + 2 * setup.known_lease_ns / _SECOND_NS

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="coherency-sim-"))
        self.share = self.directory / "share"
        self._groups = self.directory / "groups"
        self._runtime_root = self.directory / "run"
        try:
            self._prepare()
            self._tell(f"starting a daemon and {self.setup.guests} guests (--cache {self.setup.cache}) ...")
            self._serve()
            for guest in range(self.setup.guests):
                if self.setup.has_relays:
                    self._relays[guest] = Relay(self.directory / f"relay{guest}", self._runtime_root / _NAME / CONTROL_SOCKET_NAME)
                self._mount(guest)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(self) -> None:
        for directory in DIRECTORIES:
            (self.share / directory).mkdir(parents=True)
        for path in ATTRIBUTE_FILES:
            file = self.share / path
            file.touch()
            file.chmod(INITIAL_MODE)
            os.setxattr(file, XATTR, b"0")
            os.utime(file, ns=(0, mtime_ns(0)))
        (self.share / COPY_SOURCE).write_bytes(bytes(PAGE_BYTES))
        self._groups.mkdir()
        prepare_plots(self._groups, self.setup.scene)
        for guest in range(self.setup.guests):
            self.mountpoint(guest).mkdir()
            for directory in DIRECTORIES:  # rule 3
                (self.mountpoint(guest) / directory).touch()

    def inodes(self) -> dict[str, int]:
        """Of the attribute files."""
        return {path: (self.share / path).stat().st_ino for path in ATTRIBUTE_FILES}

    def mountpoint(self, guest: int) -> Path:
        return self.directory / f"guest{guest}"

    # ---- daemon and agents ----

    def _serve(self) -> None:
        self._start(
            _who(None), self._runtime_root, "serve", str(self.share), "--name", _NAME, *self._lease_options(),
            *self._dangers(SERVE_DANGEROUSLY),
        )  # fmt: skip

    def _lease_options(self) -> list[str]:
        lease_ns = self.setup.known_lease_ns
        return ["--lease", str(lease_ns / _SECOND_NS)] if lease_ns else []

    def _dangers(self, known: tuple[str, ...]) -> list[str]:
        danger = self.setup.live_dangerously
        return ["--live-dangerously", danger] if danger in known else []

    def _mount(self, guest: int) -> None:
        mode = self.setup.cache
        timeout = ["--timeout", str(AUTO_TIMEOUT_NS / _SECOND_NS)] if mode == "auto" else []
        name = _who(guest)
        runtime_root = self._relays[guest].runtime_root if guest in self._relays else self._runtime_root
        self._start(
            name, runtime_root, "mount", _NAME, str(self.mountpoint(guest)), "--cache", mode, "--guest", name, *timeout,
            *self._dangers(MOUNT_DANGEROUSLY),
        )  # fmt: skip

    def _start(self, who: str, runtime_root: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "coherency", *arguments, "--runtime-dir", str(runtime_root)]
        with open(self.directory / f"{who}.log", "ab") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, start_new_session=True, env=_environment()
            )  # fmt: skip
        self._processes[who] = process
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        if not ready or not process.stdout.readline():
            raise NotRecovered(f"'coherency {arguments[0]}' ({who}) did not start:\n{self.logged(who)}")

    def logged(self, who: str) -> str:
        """The end of what it wrote to standard error."""
        return (self.directory / f"{who}.log").read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    # ---- workers ----

    def start_workers(self, until_ns: int) -> None:
        setup = self.setup
        total = setup.guests * setup.workers
        for number in range(total):
            guest, place = divmod(number, setup.workers)
            orders = Orders(
                mount=str(self.mountpoint(guest)),
                share=str(self.share),
                groups=str(self._groups),
                record=str(self._record(number)),
                current=str(self._current(number)),
                guest=guest,
                worker=number,
                workers=total,
                scene=setup.scene,
                seed=f"{setup.seed}/{number}",
                looks=_LOOKS[setup.workload][0 if place < max(setup.workers // 2, 1) else 1],
                until_ns=until_ns,
            )
            name = f"worker{number}"
            with open(self.directory / f"{name}.log", "wb") as log:
                command = [sys.executable, "-m", "coherency.sim.worker", orders.to_json()]
                self.workers[name] = subprocess.Popen(command, stderr=log, start_new_session=True, env=_environment())

    def _record(self, number: int) -> Path:
        return self.directory / f"worker{number}.record"

    def finish_workers(self) -> tuple[list[str], list[Call]]:
        """Wait until all have ended; returns what is wrong with those that did not, and the calls that do not return."""
        wrong, endless = [], []
        deadline = time.monotonic() + ENDLESS_S + 2 * self.setup.known_lease_ns / _SECOND_NS
        for number, (name, process) in enumerate(self.workers.items()):
            try:
                code = process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                call = endless_call(self._current(number), number // self.setup.workers, number)
                endless.append(call)
                wrong.append(f"a call of {name} does not return: {' '.join(map(str, call.step))}")
                continue
            if code:
                wrong.append(f"{name} ended with {code}:\n{self.logged(name)}")
        return wrong, endless

    def _current(self, number: int) -> Path:
        return self.directory / f"worker{number}.current"

    def records(self) -> list[Path]:
        return [path for number in range(len(self.workers)) if (path := self._record(number)).exists()]

    # ---- faults ----

    def inject(self, fault: Fault, wait: Callable[[float], object]) -> Window:
        """Let it happen and mend it. Returns when everything works again; ``wait`` is given seconds.

        Raises :class:`NotRecovered` if it does not.
        """
        setup, start_ns = self.setup, time.monotonic_ns()
        self._inject(fault, lambda: wait(fault.hold_ns / _SECOND_NS))
        everybody = range(setup.guests)
        for guest in everybody:
            self._await_recovery(guest)
        broken = {"nobody": (), "guest": (fault.guest,), "all": everybody}[FAULTS[fault.kind].breaks]
        own_ns, others_ns = patience_ns(fault, setup.known_lease_ns, setup.guests * setup.workers)
        return Window(
            str(fault), start_ns, time.monotonic_ns(), tuple(guest for guest in broken if guest is not None), fault.guest,
            own_ns, others_ns,
        )  # fmt: skip

    def _inject(self, fault: Fault, hold: _Hold) -> None:
        guest = fault.guest
        match fault.kind:
            case "stop-agent" | "stop-daemon":
                with self._stopped(guest):
                    hold()
            case "kill-agent" | "kill-daemon":
                self._start_again(guest, hold, signal.SIGKILL)
            case "restart-daemon":
                self._start_again(guest, hold, signal.SIGTERM)
            case "kill-daemon-unnoticed":
                with self._stopped(guest):
                    self._start_again(None, lambda: None, signal.SIGKILL)
                    hold()
            case "cut-channel" | "mute-channel" | "slow-acks" | "slow-recalls":
                self._disturb_channel(fault, hold)
            case _:
                raise ValueError(f"nobody knows how to {fault.kind}")

    def _disturb_channel(self, fault: Fault, hold: _Hold) -> None:
        assert fault.guest is not None
        relay = self._relays[fault.guest]
        match fault.kind:
            case "cut-channel":
                relay.cut()
            case "mute-channel":
                relay.mute()
            case "slow-acks":
                relay.delay(to_daemon_ns=fault.delay_ns)
            case _:
                relay.delay(to_guest_ns=fault.delay_ns)
        try:
            hold()
        finally:
            relay.mend()

    @contextlib.contextmanager
    def _stopped(self, guest: int | None) -> Iterator[None]:
        """SIGSTOP for a guest's agent, or the daemon, for the length of the block."""
        process = self._processes[_who(guest)]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def _start_again(self, guest: int | None, hold: _Hold, number: int) -> None:
        """After a signal that ends a guest's agent, or the daemon."""
        self._processes[_who(guest)].send_signal(number)
        self._reap(_who(guest))
        hold()
        if guest is None:
            self._serve()
        else:
            self._mount(guest)

    def _reap(self, who: str) -> None:
        process = self._processes.pop(who)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise NotRecovered(f"{who} did not end after SIGTERM:\n{self.logged(who)}") from None
        finally:
            if process.stdout is not None:
                process.stdout.close()

    def _await_recovery(self, guest: int) -> None:
        """Until the guest can change something. On a thread: a call on a broken mount may never return."""
        recovered = threading.Event()
        probe = threading.Thread(target=self._probe, args=(guest, recovered), daemon=True)
        probe.start()
        if not recovered.wait(self._recovery_s):
            raise NotRecovered(
                f"guest {guest} does not work again {self._recovery_s:.0f} s after a fault:\n{self.logged(_who(guest))}"
            )
        probe.join()

    def _probe(self, guest: int, recovered: threading.Event) -> None:
        directory = self.mountpoint(guest) / f"probe{guest}"
        deadline = time.monotonic() + self._recovery_s
        while time.monotonic() < deadline:
            try:
                if not os.path.ismount(self.mountpoint(guest)):
                    raise NotADirectoryError
                with contextlib.suppress(FileExistsError):
                    directory.mkdir()
                directory.rmdir()
            except OSError:
                time.sleep(_PROBE_EVERY_S)
            else:
                recovered.set()
                return

    # ---- the end ----

    def close(self) -> None:
        """Rule 2. Safe to call twice."""
        for process in (*self._processes.values(), *self.workers.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        for process in self.workers.values():
            process.kill()
        for who in sorted(self._processes, reverse=True):  # the guests before the daemon
            self._processes[who].terminate()
            with contextlib.suppress(NotRecovered):
                self._reap(who)
        for mount in reversed(mounts()):
            if Path(os.fsdecode(mount.path)).is_relative_to(self.directory.resolve()):
                syscalls.umount(os.fsdecode(mount.path), syscalls.MNT_DETACH)
        for relay in self._relays.values():
            relay.close()
        for process in self.workers.values():
            process.wait()  # with its mount gone, nothing holds it any more
        shutil.rmtree(self.directory, ignore_errors=True)


def _who(guest: int | None) -> str:
    """The name of a guest's agent, or of the daemon."""
    return "daemon" if guest is None else f"guest{guest}"


def _environment() -> dict[str, str]:
    """The children run this very package, installed or not."""
    package_parent = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))}

"""A daemon reduced to its control channel: name, table, heartbeat and server, in this process or in one of its own.

    python -m tests.control_daemon ROOT NAME

prints "serving" and serves until it is killed, or until its standard input ends: then it stops in good order.
"""

import os
import secrets
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen
from types import TracebackType
from typing import Self

from coherency.daemon.runtime import Claim, RuntimeDirectory
from coherency.daemon.server import ControlServer
from coherency.daemon.switchboard import Limits
from coherency.leases import DEFAULT_LEASE_NS, agent_lease_ns
from coherency.protocol import Welcome
from coherency.shm_memory import create_memfd
from coherency.shm_table import HEARTBEAT_PERIOD_NS, State, TableWriter, bytes_needed
from tests.control_messages import REPORT
from tests.switchboards import Notebook, make_leasing

SLOT_COUNT = 1 << 12
TRUST_NS = 1_000_000_000
PATIENT = Limits(statistics_ns=10_000_000_000)
"""On a busy machine a good guest may need longer than usual, and is to be waited for."""
REPOSITORY = Path(__file__).resolve().parents[1]


class ControlDaemon:
    """Serves `name` in this process from construction to `close`."""

    def __init__(
        self,
        root: Path,
        name: str,
        *,
        limits: Limits | None = None,
        trust_ns: int = TRUST_NS,
        lease_ns: int = DEFAULT_LEASE_NS,
    ) -> None:
        self.root, self.name = root, name
        self.claim: Claim = RuntimeDirectory(root, name).claim()
        table_bytes = bytes_needed(SLOT_COUNT)
        self.memory = create_memfd(f"coherency-{name}", table_bytes)
        table_id = (int.from_bytes(os.urandom(8)), int.from_bytes(os.urandom(8)))
        self.table = TableWriter.create(self.memory.words, slot_count=SLOT_COUNT, table_id=table_id)
        self.table.set_state(State.SERVING)
        self.table_fd = self.memory.read_only_fd()
        self.path = self.claim.directory.control_socket
        self.journal = Notebook()
        self.leasing = make_leasing(
            lease_ns=lease_ns,
            slot_count=SLOT_COUNT,
            epoch=lambda: self.table.statistics().epoch,
            journal=self.journal,
            new_session=lambda: secrets.randbits(63) + 1,
        )
        export, agent_ns = str(self.claim.directory.export), agent_lease_ns(lease_ns)
        self.server = ControlServer(
            self.path,
            welcome=Welcome(0, 0, agent_ns, *table_id, table_bytes, trust_ns, "/share", export),
            leasing=self.leasing,
            table_fd=self.table_fd,
            status=lambda: {**REPORT, "epoch": self.table.statistics().epoch},
            invalidate=self.table.advance_epoch,
            limits=limits or PATIENT,
        )
        self.server.start()
        self._stopping = threading.Event()
        self._heart = threading.Thread(target=self._beat)
        self._heart.start()

    def _beat(self) -> None:
        while not self._stopping.wait(HEARTBEAT_PERIOD_NS / 1e9):
            self.table.beat()

    def close(self) -> None:
        self.server.close()
        self.server.check()
        self._stopping.set()
        self._heart.join()
        self.table.close()
        os.close(self.table_fd)
        self.memory.close()
        self.claim.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class DaemonProcess:
    """The same in a process of its own, which can be killed or stopped."""

    root: Path
    name: str
    process: Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "tests.control_daemon", str(self.root), self.name]
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=REPOSITORY)
        assert self.process.stdout
        assert self.process.stdout.readline() == "serving\n"

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        self._reap()

    def stop_in_order(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self._reap() == 0

    def _reap(self) -> int:
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.kill()


def main(root: str, name: str) -> None:
    with ControlDaemon(Path(root), name):
        sys.stdout.write("serving\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])

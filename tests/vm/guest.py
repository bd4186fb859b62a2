"""A virtual machine that is a guest of a daemon, made with what `coherency vm-args` prints and nothing else."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.vm import inside, parts
from tests.vm.lines import Pending
from tests.vm.machine import Machine, Share

LOWER = "/mnt/share"
COMMAND_S = 60.0
START_S = 100.0
"""Under software emulation an agent takes ten seconds to start, and longer if it is not alone."""


def vm_args(runtime_dir: Path, name: str, guest: str) -> dict[str, Any]:
    """What `coherency vm-args --json` says."""
    command = ["vm-args", name, "--guest", guest, "--json", "--runtime-dir", str(runtime_dir)]
    answer = subprocess.run(
        [sys.executable, "-m", "coherency", *command],
        check=True, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(parts.ROOT)},
    )  # fmt: skip
    document: dict[str, Any] = json.loads(answer.stdout)
    return document


class Guest:
    """The machine `name`, which the daemon will know by the same name. A context manager, like `Machine`."""

    def __init__(self, name: str, directory: Path, runtime_dir: Path, share: str, others: Sequence[Share] = ()) -> None:
        """`share` is served below `runtime_dir`, now; `others` are of stock virtiofs."""
        self.name = name
        self.args = vm_args(runtime_dir, share, name)
        self.machine = Machine(name, directory, others, options=self.args["qemu"], virtiofsd=self.args["virtiofsd"])
        self._mount = shlex.split(self.args["mount"])
        self.mountpoint = Path(self._mount[3])
        self._agent = 0
        self.mode = ""
        """Of the mount that is there; empty if there is none."""

    def __enter__(self) -> Self:
        self.machine.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.machine.__exit__(*exc)

    def wait_until_ready(self) -> None:
        """Return when it takes calls, and has what virtiofsd serves."""
        self.machine.wait_until_ready()
        for place in (LOWER, self.mountpoint):
            self.machine.call(os.makedirs, place)
        self.machine.call(inside.check, ["mount", "-t", "virtiofs", self.args["tag"], LOWER], COMMAND_S)

    def start_mount(self, cache: str) -> Pending[int]:
        """Begin to mount, in a mode; `mounted` is to be told what comes of it."""
        assert not self.mode, "one mount for each port"
        assert self._mount[0] == "coherency"
        command = [sys.executable, "-m", *self._mount, "--cache", cache]
        return self.machine.start_call(inside.start, command, self.log)

    @property
    def log(self) -> Path:
        """What the agent says, in the guest."""
        return Path(f"/run/{self.name}.log")

    def logged(self) -> str:
        """It."""
        return self.machine.call(Path.read_text, self.log)

    def mounted(self, pending: Pending[int], cache: str) -> None:
        """Wait until the mount is there."""
        self._agent, self.mode = pending(START_S), cache

    def mount(self, cache: str) -> None:
        """Mount in a mode."""
        self.mounted(self.start_mount(cache), cache)

    def end_agent(self, number: int = signal.SIGTERM) -> int:
        """End the agent by a signal; returns its exit code. Who kills it leaves a dead mount behind, and no message."""
        agent, self._agent, self.mode = self._agent, 0, ""
        return self.machine.call(inside.end, agent, number, COMMAND_S)

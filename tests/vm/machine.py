"""One virtual machine: its QEMU, its virtiofsd processes, and the channel on which the host tells it what to do.

1. Every wait has a deadline, and says at its end what was waited for, with the end of the guest's console.
2. Whatever happens to the process that runs the machine, nothing of it stays: QEMU and virtiofsd are told by the kernel
   to die with the thread that started them, and mounts are made in namespaces of virtiofsd's own.
3. So a machine is started, and stopped, by a thread that lives longer than it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

from tests.vm import initramfs, inside, parts
from tests.vm.lines import CALL_S, Monitor, Pending, RunnerLine, VmError

P = ParamSpec("P")
R = TypeVar("R")

BOOT_S = 100.0
STOP_S = 20.0
MEMORY = ("-m", "512M", "-object", "memory-backend-memfd,id=memory,size=512M,share=on", "-numa", "node,memdev=memory")
"""virtiofsd must be able to map it."""

FURTHER = "further"
"""What the virtiofsd is called here that the options speak of."""

_POLL_S = 0.02
_RUNNER_PORT = "runner"
_CONSOLE_LINES = 40
_PCI_DEVICE_OF_VIRTIOFS = 0x105A
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


class Share(NamedTuple):
    """A directory of the host that a guest gets by stock virtiofs, at `/mnt/TAG`."""

    tag: str
    directory: Path
    cache: str
    """`none`, `auto` or `always`, as virtiofsd means it."""


class Machine:
    """A context manager: entering starts to boot it, `wait_until_ready` waits; so several can boot at a time."""

    def __init__(
        self,
        name: str,
        directory: Path,
        shares: Sequence[Share] = (),
        *,
        options: Sequence[str] = MEMORY,
        virtiofsd: Sequence[str] = (),
    ) -> None:
        """`directory`: short (sockets lie in it), made if need be.

        `options`: further ones for QEMU, memory among them; `virtiofsd`: the command of one that they speak of.
        """  # fmt: skip
        self.name, self.directory, self.shares = name, directory, tuple(shares)
        self._options, self._further_virtiofsd = tuple(options), tuple(virtiofsd)
        self.console = directory / "console.log"
        self.virtiofsds: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.directory.mkdir(exist_ok=True)
        with contextlib.ExitStack() as undo:
            self._undo = undo
            self._boot()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    # --- booting ---

    def _boot(self) -> None:
        self._pack_initramfs()
        root = self.directory / "root"
        root.mkdir(exist_ok=True)
        self._serve(
            Share(initramfs.ROOT_TAG, root, "always"), "unshare", "--mount", "sh", "-c", bind_root_and_exec(root), "sh"
        )
        for share in self.shares:
            self._serve(share)
        if self._further_virtiofsd:
            (path,) = [each.partition("=")[2] for each in self._further_virtiofsd if each.startswith("--socket-path=")]
            self._start_virtiofsd(FURTHER, self._further_virtiofsd, Path(path))
        self._run_qemu()
        self._monitor = Monitor(self._connect("qmp"), self.problem)
        self._undo.callback(self._monitor.close)
        self._runner = RunnerLine(self._connect("runner"), self.problem)
        self._undo.callback(self._runner.close)

    def _pack_initramfs(self) -> None:
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(parts.ROOT), *sys.path])),
        }
        command = [sys.executable, "-m", "tests.vm.runner", _RUNNER_PORT]
        script = initramfs.script([share.tag for share in self.shares], command, environment)
        (self.directory / "initramfs").write_bytes(initramfs.pack(script))

    def _serve(self, share: Share, *prefix: str) -> None:
        path = self._socket(share.tag)
        options = f"source={share.directory},cache={share.cache},announce_submounts,xattr,posix_acl"
        command = [*prefix, str(parts.VIRTIOFSD), f"--socket-path={path}", "-o", options]
        self._start_virtiofsd(share.tag, command, path)

    def _start_virtiofsd(self, tag: str, command: Sequence[str], path: Path) -> None:
        path.unlink(missing_ok=True)
        with open(self.directory / f"virtiofsd-{tag}.log", "wb") as log:
            process = subprocess.Popen(
                [*_DIES_WITH_US, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._undo.callback(_end, process)
        self.virtiofsds[tag] = process
        self._until(path.exists, f"virtiofsd of {tag} is ready", process)

    def _socket(self, tag: str) -> Path:
        return self.directory / f"{tag}.sock"

    def _run_qemu(self) -> None:
        arguments = [
            parts.QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1",
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-serial", f"file:{self.console}",
            "-kernel", str(parts.kernel()), "-initrd", str(self.directory / "initramfs"),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
            "-qmp", f"unix:{self.directory / 'qmp.sock'},server=on,wait=off",
            "-device", "virtio-serial-pci,id=serial",
            "-chardev", f"socket,id=runner,path={self.directory / 'runner.sock'},server=on,wait=off",
            "-device", f"virtserialport,bus=serial.0,chardev=runner,name={_RUNNER_PORT}",
        ]  # fmt: skip
        for tag in (initramfs.ROOT_TAG, *(share.tag for share in self.shares)):
            arguments += ["-chardev", f"socket,id=fs-{tag},path={self._socket(tag)}"]
            arguments += ["-device", f"vhost-user-fs-pci,id=fs-{tag},chardev=fs-{tag},tag={tag}"]
        for name in ("qmp", "runner"):
            (self.directory / f"{name}.sock").unlink(missing_ok=True)
        self.console.write_bytes(b"")
        with open(self.directory / "qemu.log", "wb") as log:
            self.qemu = subprocess.Popen(
                [*_DIES_WITH_US, *arguments, *self._options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._undo.callback(_end, self.qemu)

    def _connect(self, name: str) -> socket.socket:
        path, connection = self.directory / f"{name}.sock", socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(CALL_S)
            self._until(lambda: connection.connect_ex(str(path)) == 0, f"QEMU listens on {path.name}", self.qemu)
        except BaseException:
            connection.close()
            raise
        return connection

    def _until(self, condition: Callable[[], object], what: str, process: subprocess.Popen[bytes]) -> None:
        end_s = time.monotonic() + CALL_S
        while not condition():
            if process.poll() is not None:
                raise self.problem(f"ended with {process.returncode}, but {what} was waited for")
            if time.monotonic() > end_s:
                raise self.problem(f"not within {CALL_S:.0f} s: {what}")
            time.sleep(_POLL_S)

    def wait_until_ready(self) -> None:
        """Return when the guest takes calls."""
        self._runner.ready(BOOT_S)

    # --- using ---

    def call(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """What `function(*arguments)` returns, or raises, in the guest. It is called by its name there; no keywords."""
        return self.start_call(function, *arguments, **named)()

    def start_call(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> Pending[R]:
        """Like `call`, without waiting: calling what is returned does, for `CALL_S` or the seconds it is given."""
        assert not named, "calls have no keywords"
        return self._runner.start(function, arguments)

    def virtiofs_answers(self, tag: str) -> int:
        """How often virtiofsd has interrupted the guest: each answer does, unless it comes with another.

        `tag`: of one of the `shares`, or `FURTHER`, whose device has no name in QEMU.
        """
        name = "" if tag == FURTHER else f"fs-{tag}"
        (bus,) = self.qmp("query-pci")
        (slot,) = [
            each["slot"] for each in bus["devices"]
            if each["qdev_id"] == name and each["id"]["device"] == _PCI_DEVICE_OF_VIRTIOFS
        ]  # fmt: skip
        return self.call(inside.interrupts_of_requests, f"0000:00:{slot:02x}.0")

    def qmp(self, command: str, **arguments: object) -> Any:
        """What QEMU answers on its monitor."""
        return self._monitor.execute(command, arguments)

    @property
    def is_running(self) -> bool:
        return self.qemu.poll() is None

    def kill(self) -> None:
        """The guest, from one instant to the next; virtiofsd ends with it."""
        _end(self.qemu)

    def problem(self, what: str) -> VmError:
        """An error that says what the machine has said: the ends of its console and of the logs of its processes."""
        said = [f"{self.name}: {what}"]
        for log in (self.console, self.directory / "qemu.log", *self.directory.glob("virtiofsd-*.log")):
            with contextlib.suppress(OSError):
                if lines := log.read_text(errors="replace").splitlines()[-_CONSOLE_LINES:]:
                    said += [f"--- {log.name}", *lines]
        return VmError("\n".join(said))


def bind_root_and_exec(place: Path) -> str:
    """A script that makes the host's root, with the file systems on which our Python lies, appear at `place`.

    virtiofsd cannot serve `/` itself: it makes what it serves its own root. Other mounts stay where they are.
    """
    needed = [parts.ROOT, Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix)]
    needed += [Path(each) for each in sysconfig.get_paths().values()] + [Path("/usr/bin")]
    needed += [each.resolve() for each in needed]
    mounts = {above for each in needed for above in (each, *each.parents) if os.path.ismount(above)}
    lines = [shlex.join(["mount", "--bind", str(mount), f"{place}{mount}"]) for mount in sorted(mounts)]
    return " && ".join([*lines, 'exec "$@"'])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Now; nothing that it holds needs saving."""
    process.kill()
    process.wait(STOP_S)

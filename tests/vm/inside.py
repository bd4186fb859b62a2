"""What the host asks a guest to do, beside functions of the standard library. Runs in the guest's runner."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """A program, to its end."""
    return subprocess.run(
        arguments, check=False, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )


def check(arguments: Sequence[str], timeout_s: float) -> str:
    """A program that must succeed; returns what it prints."""
    done = run(arguments, timeout_s)
    if done.returncode != 0:
        raise ChildProcessError(f"{shlex.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def interrupts_of_requests(pci_address: str) -> int:
    """So many has the request queue of a virtiofs device made."""
    (device,) = Path("/sys/bus/pci/devices", pci_address).glob("virtio[0-9]*")
    for line in Path("/proc/interrupts").read_text().splitlines():
        if line.endswith(f" {device.name}-requests.0"):
            return sum(int(each) for each in line.split()[1 : 1 + len(os.sched_getaffinity(0))])
    raise LookupError(f"{pci_address} has no queue of requests")


_programs: dict[int, subprocess.Popen[str]] = {}


def start(arguments: Sequence[str], log: Path) -> int:
    """A program that says a line when it is ready, and stays; returns its process id then. Its errors go to a file."""
    with open(log, "ab") as errors:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    if not process.stdout.readline():
        raise ChildProcessError(f"{arguments} ended with {process.wait()}:\n{log.read_text()}")
    _programs[process.pid] = process
    return process.pid


def end(pid: int, number: int, timeout_s: float) -> int:
    """Send a signal to what `start` has started; returns its exit code."""
    process = _programs[pid]
    process.send_signal(number)
    code = process.wait(timeout_s)
    del _programs[pid]
    assert process.stdout is not None
    process.stdout.close()
    return code

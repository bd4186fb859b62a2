"""The machines themselves: they boot, what goes wrong is told, and nothing of them stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.t5_vm.bed import NAMES, Bed
from tests.vm import inside, parts
from tests.vm.lines import VmError
from tests.vm.machine import Machine
from tests.waiting import until

BOOTS_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from tests.vm.machine import Machine
with Machine("doomed", Path(sys.argv[1])) as machine:
    print(machine.qemu.pid, *(each.pid for each in machine.virtiofsds.values()), flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_has_the_python_of_the_tests_and_writes_nothing_to_the_host(
    bed: Bed, name: str, tmp_path: Path
) -> None:
    machine = bed.guests[name].machine
    assert machine.call(os.getcwd) == "/"
    assert machine.call(inside.run, [sys.executable, "-c", "import coherency, msgpack"], 60).returncode == 0
    machine.call(Path.write_text, tmp_path / "made", "in the guest")
    assert machine.call(Path.read_text, tmp_path / "made") == "in the guest"
    assert list(tmp_path.iterdir()) == []


def test_what_a_call_raises_is_raised_here(bed: Bed) -> None:
    with pytest.raises(FileNotFoundError):
        bed.guests["vm1"].machine.call(os.stat, "/nowhere")


def test_calls_do_not_wait_for_each_other(bed: Bed) -> None:
    read, write = bed.guests["vm1"].machine.call(os.pipe)
    waits = bed.guests["vm1"].machine.start_call(os.read, read, 1)
    bed.guests["vm1"].machine.call(os.write, write, b"x")
    assert waits() == b"x"


def test_a_failed_boot_says_what_the_console_said(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MODULES", tuple(name for name in parts.MODULES if name != "virtiofs"))
    with Machine("crippled", socket_dir / "vm") as machine, pytest.raises(VmError, match="vm: no root"):
        machine.wait_until_ready()


def test_machines_die_with_who_runs_them(socket_dir: Path) -> None:
    """Whatever happens to a run of the tests: its end by SIGKILL leaves no QEMU, no virtiofsd and no mount behind."""
    place = socket_dir / "vm"
    owner = subprocess.Popen(
        [sys.executable, "-c", BOOTS_UNTIL_KILLED, place],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(parts.ROOT)},
    )  # fmt: skip
    with owner:
        assert owner.stdout is not None
        pids = owner.stdout.readline().split()
        owner.kill()
    assert len(pids) == 2
    until(lambda: not any(_alive(pid) for pid in pids))
    assert f" {place}" not in Path("/proc/self/mountinfo").read_text()


def _alive(pid: str) -> bool:
    """Whether the process is there, and more than something to be reaped."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False

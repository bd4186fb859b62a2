"""What an agent does in a virtual machine, in every mode: real mounts, with stand-ins for the machine's port and device.

Between real machines t5 does it in the modes that promise something.
"""

import os
from pathlib import Path

import pytest

from coherency.guest_agent.mount import COHERENT_MODES, MODES, GuestMount, MountOptions
from tests.fake_machine import FakeMachine, add_pci_device
from tests.guests import Host
from tests.waiting import until

# Whatever was on the line of a machine hangs up when that ends, which may be in time for the daemon to say so.
pytestmark = pytest.mark.expected_logs("hung up without a goodbye", "could not be read")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_with_the_port_and_the_device_of_a_machine(mode: str, socket_dir: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    with Host(socket_dir) as host, FakeMachine(tmp_path, host.runtime_dir / host.name / "control.sock") as machine:
        add_pci_device(machine.sysfs, "0000:00:05.0", host.runtime_dir / host.name / "table")
        (host.share / "file").write_bytes(b"1")
        options = MountOptions(
            host.name, mountpoint, Path("/nowhere"), mode, guest_name="vm1", lower=host.export, link=machine.link(host.name)
        )
        mount = GuestMount(options)
        mount.start()
        try:
            (guest,) = host.status()["guests"]
            assert (guest["name"], guest["line"], guest["mode"]) == ("vm1", "serial", mode)
            assert (mountpoint / "file").read_bytes() == b"1"
            (mountpoint / "new").write_bytes(b"by the guest")
            assert (host.share / "new").read_bytes() == b"by the guest"
            os.truncate(host.export / "file", 100)
            if mode in COHERENT_MODES:
                until(lambda: mode != "prompt" or os.stat(mountpoint / "file").st_size == 100)
                assert os.stat(mountpoint / "file").st_size == 100
        finally:
            mount.close()
        until(lambda: host.status()["guests"] == [])

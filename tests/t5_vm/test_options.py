"""What `coherency vm-args` prints for libvirt, in a QEMU to which the devices are given as libvirt does."""

import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from coherency.vm_args import VirtualMachineOptions, libvirt_text
from tests.vm.parts import QEMU

QEMU_S = 60.0
OF_LIBVIRT = '{"driver":"pcie-root-port","port":8,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x1"}'
"""libvirt decides about the address of each of its devices, and begins with this one; in JSON since 7.9, with QEMU 6.2 or later."""


@pytest.fixture
def options(tmp_path: Path) -> VirtualMachineOptions:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/table").write_bytes(bytes(1 << 20))
    return VirtualMachineOptions("work", "vm1", str(tmp_path), 1 << 20, True, "/usr/libexec/virtiofsd")


def starts(*options: str) -> subprocess.CompletedProcess[str]:
    """Make the machine, and end it before it has begun."""
    machine = ["-machine", "q35,accel=tcg", "-m", "64M", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
    return subprocess.run(
        [QEMU, *machine, "-device", OF_LIBVIRT, *options],
        input="info pci\nquit\n", check=False, capture_output=True, text=True, timeout=QEMU_S,
    )  # fmt: skip


def test_the_table_of_a_libvirt_domain_takes_a_place_that_libvirt_has_left(options: VirtualMachineOptions) -> None:
    domain = ElementTree.fromstring(libvirt_text(options))
    arguments = [each.attrib["value"] for each in domain.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")]
    done = starts(*arguments)
    assert done.returncode == 0, done.stderr
    assert "1af4:1110" in done.stdout


def test_negative_control_not_described_in_json_it_takes_one_of_libvirts(options: VirtualMachineOptions) -> None:
    done = starts(*(each for pair in options.table_options() for each in pair))
    assert done.returncode == 1
    assert "in use by ivshmem-plain" in done.stderr

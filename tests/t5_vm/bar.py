"""The device that shows the version table to a machine, as root of that machine gets at it: these functions are called there."""

import mmap
from pathlib import Path

IVSHMEM = ("0x1af4", "0x1110")
BYTES = 1 << 16


def device_of_table() -> Path:
    """Its PCI device."""
    (found,) = [
        each for each in Path("/sys/bus/pci/devices").iterdir()
        if ((each / "vendor").read_text().strip(), (each / "device").read_text().strip()) == IVSHMEM
    ]  # fmt: skip
    return found


def read_table() -> bytes:
    """The beginning of the device's memory."""
    device = device_of_table()
    (device / "enable").write_text("1")
    with open(device / "resource2", "rb") as file, mmap.mmap(file.fileno(), BYTES, prot=mmap.PROT_READ) as memory:
        return bytes(memory)


def overwrite_table() -> None:
    """What a hostile root would do, who may map the device as he likes."""
    device = device_of_table()
    (device / "enable").write_text("1")
    with open(device / "resource2", "r+b") as file, mmap.mmap(file.fileno(), BYTES) as memory:
        memory[:] = b"\xff" * BYTES

"""What a virtual machine is made of: programs of this host, and what scripts/set-up-vm has unpacked."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / "build" / "vm"

QEMU = "qemu-system-x86_64"
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
BUSYBOX = UNPACKED / "bin" / "busybox"

MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "fuse", "virtiofs",
    "virtio_console", "overlay",
)  # fmt: skip
"""Modules of the guest's kernel, each after those that it needs."""


def why_no_vm() -> str | None:
    """Why no virtual machine can be run here; None if one can."""
    if os.geteuid() != 0:
        return "needs root: virtiofsd does"
    for program in (QEMU, VIRTIOFSD, "unshare", "setpriv"):
        if shutil.which(program) is None:
            return f"needs {program}: see VM_PROGRAMS in the Makefile"
    if not BUSYBOX.exists() or not list((UNPACKED / "boot").glob("vmlinuz-*")):
        return f"needs a kernel and busybox in {UNPACKED}: scripts/set-up-vm says why they are not there"
    return None


def kernel() -> Path:
    """The kernel's image."""
    (found,) = (UNPACKED / "boot").glob("vmlinuz-*")
    return found


def module(name: str) -> Path:
    """A module of that kernel."""
    (found,) = (UNPACKED / "lib" / "modules").rglob(f"{name}.ko")
    return found

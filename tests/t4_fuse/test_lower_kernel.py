"""What the host's own kernel keeps, or tells, of the export must not mislead a guest in mode access."""

import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coherency.daemon.service import Service, ServiceOptions
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import Deferred, Reply
from coherency.guest_agent.filesystem import CachingFileSystem
from coherency.guest_agent.mount import GuestMount, MountOptions

_ACL = "system.posix_acl_access"


def _acl(permissions: int) -> bytes:
    """An ACL with an entry for user 1000: acl(5), and the kernel's posix_acl_xattr.h."""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, permissions, 1000), (4, 4, nobody), (16, 7, nobody), (32, 4, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


class World:
    """Daemon and guest in this process, so that a test can hold a reply back."""

    def __init__(self, directory: Path, undo: ExitStack) -> None:
        self.share, self.guest = directory / "share", directory / "guest"
        self.share.mkdir()
        self.guest.mkdir()
        # Nobody watches: a mount inside the share would have everything fetched anew, and hide what a listing says.
        self.service = Service(ServiceOptions(self.share, "test", directory / "run", watch=False))
        self.service.start()
        undo.callback(self.service.close)
        mount = GuestMount(MountOptions("test", self.guest, directory / "run", "access"))
        mount.start()
        undo.callback(mount.close)
        self.export = self.service.directory.export


@pytest.fixture
def world(socket_dir: Path) -> Iterator[World]:
    with ExitStack() as undo:
        yield World(socket_dir, undo)


def _acl_after_a_held_back_reply(world: World) -> bytes:
    """What the guest reads once an ACL has changed, if it asked between the end of the change and the reply to it."""
    held, release = threading.Event(), threading.Event()
    operations = world.service.session._operations
    setxattr = operations[Opcode.SETXATTR]

    def hold(request: Request) -> Reply | Deferred:
        reply = setxattr(request)
        held.set()
        release.wait(20)
        return reply

    (world.share / "file").write_text("")
    os.setxattr(world.export / "file", _ACL, _acl(7))
    # By descriptors, as agents do it: a path is looked up, and looking up drops what the kernel keeps of the inode.
    reader, lower = (os.open(root / "file", os.O_RDONLY) for root in (world.guest, world.export))
    assert os.getxattr(lower, _ACL) == _acl(7)  # the kernel of the export keeps it from now on
    operations[Opcode.SETXATTR] = hold
    writer = threading.Thread(target=os.setxattr, args=(lower, _ACL, _acl(5)))
    writer.start()
    try:
        assert held.wait(20)
        os.getxattr(reader, _ACL)
    finally:
        release.set()
        writer.join()
        os.close(reader)
        os.close(lower)
    return os.getxattr(world.guest / "file", _ACL)


def test_an_old_acl_of_the_kernel_is_not_kept_under_the_new_version(world: World) -> None:
    assert _acl_after_a_held_back_reply(world) == _acl(5)


def test_without_asking_for_attributes_the_old_acl_would_be_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(CachingFileSystem, "_fetch_acl", Passthrough.getxattr)
    assert _acl_after_a_held_back_reply(world) == _acl(7)


def test_a_listing_does_not_say_what_is_mounted_on_a_name(world: World, tmp_path: Path) -> None:
    """It tells the inode number of what lies below, which may well have another name that the guest knows."""
    (world.share / "covered").write_text("below")
    (world.share / "known").hardlink_to(world.share / "covered")
    (tmp_path / "above").write_text("something else")
    subprocess.run(["mount", "--bind", tmp_path / "above", world.share / "covered"], check=True)
    try:
        assert (world.guest / "known").stat().st_size == len("below")
        assert sorted(os.listdir(world.guest)) == ["covered", "known"]
        assert (world.guest / "covered").stat().st_size == len("something else")
    finally:
        subprocess.run(["umount", "--lazy", world.share / "covered"], check=True)

"""The mount of a killed agent makes room for the next one in every mode, whatever the kernel still believes of it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.errors import MountError
from coherency.fuse.mounts import remove_dead_mount
from coherency.guest_agent.mount import MODES
from tests.file_systems import mounted
from tests.guests import Host


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


@pytest.mark.parametrize("mode", MODES)
def test_guest_is_mounted_again(host: Host, mode: str) -> None:
    timeout = ["--timeout", "600"] if mode == "auto" else []
    place = host.mount(mode, mode, *timeout)
    place.stat()
    with pytest.raises(MountError, match="already"):
        remove_dead_mount(place)
    host.guests[mode].kill()
    if mode in ("auto", "always"):
        place.stat()  # a dead mount that looks alive: what the test is about
    host.mount(mode, mode, *timeout)
    (place / mode).touch()
    assert (host.share / mode).exists()
    assert os.path.ismount(place)


def test_a_dead_mount_that_is_covered_is_not_there(host: Host) -> None:
    """Something was mounted over a directory above it, and has a directory of the same name."""
    above = host.directory / "above"
    (above / "below").mkdir(parents=True)
    place = host.mount("above/below")
    host.guests["above/below"].kill()
    with mounted("tmpfs", above):
        (above / "below").mkdir()
        assert not remove_dead_mount(place)
    assert remove_dead_mount(place)

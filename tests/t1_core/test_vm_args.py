"""What QEMU and libvirt are told: the options as they are, and what is refused."""

import json
import shlex
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from coherency.errors import UsageError
from coherency.vm_args import VirtualMachineOptions, libvirt_text, qemu_text, qemu_version

OPTIONS = VirtualMachineOptions("work", "vm1", "/run/coherency", 1 << 24, True, "/usr/lib/qemu/virtiofsd")
QEMU_NS = "{http://libvirt.org/schemas/domain/qemu/1.0}"


def words(text: str) -> list[str]:
    return [word for line in text.splitlines() if not line.startswith("#") for word in shlex.split(line)]


def test_the_options_of_qemu() -> None:
    assert words(qemu_text(OPTIONS)) == [
        "-object", "memory-backend-memfd,id=coherency-work-memory,size=512M,share=on",
        "-numa", "node,memdev=coherency-work-memory",
        "-m", "512M",
        "-object", "memory-backend-file,id=coherency-work-table,size=16777216,share=on,readonly=on,mem-path=/run/coherency/work/table",
        "-device", "ivshmem-plain,memdev=coherency-work-table",
        "-device", "virtio-serial-pci,id=coherency-work-serial",
        "-chardev", "socket,id=coherency-work-control,path=/run/coherency/work/control.sock,reconnect=1",
        "-device", "virtserialport,bus=coherency-work-serial.0,chardev=coherency-work-control,name=coherency.0",
        "-chardev", "socket,id=coherency-work-share,path=/run/coherency/work-vm1.virtiofs",
        "-device", "vhost-user-fs-pci,chardev=coherency-work-share,tag=coherency-work",
    ]  # fmt: skip
    assert words(qemu_text(OPTIONS)) == [word for pair in OPTIONS.qemu() for word in pair]


def test_what_else_there_is_to_do_stands_in_comments() -> None:
    comments = [line for line in qemu_text(OPTIONS).splitlines() if line.startswith("#")]
    assert f"#   {shlex.join(OPTIONS.virtiofsd_command)}" in comments
    assert "#   mount -t virtiofs coherency-work /mnt/share" in comments
    assert comments[-1] == (
        "#   coherency mount work /mnt/work --lower /mnt/share --table pci --control virtio-serial --guest vm1"
    )


@pytest.mark.parametrize(
    ("virtiofsd", "has_window", "arguments"),
    [
        ("/usr/lib/qemu/virtiofsd", True, ["-o", "source=/run/coherency/work/vm,cache=none,xattr"]),
        ("/usr/lib/qemu/virtiofsd", False, ["-o", "source=/run/coherency/work/export,cache=none,xattr"]),
        ("/usr/libexec/virtiofsd", True, ["--shared-dir=/run/coherency/work/vm", "--cache=never", "--xattr"]),
    ],
)
def test_virtiofsd_serves_the_window_if_there_is_one_and_caches_nothing(
    virtiofsd: str, has_window: bool, arguments: list[str]
) -> None:
    command = replace(OPTIONS, virtiofsd=virtiofsd, has_window=has_window).virtiofsd_command
    if virtiofsd.startswith("/usr/lib/qemu"):
        assert command[:2] == ["env", "MALLOC_ARENA_MAX=1"]
        command = command[2:]
    assert command[:3] == [virtiofsd, "--socket-path=/run/coherency/work-vm1.virtiofs", "--thread-pool-size=64"]
    assert command[3:] == arguments


def test_the_elements_of_libvirt() -> None:
    domain = ElementTree.fromstring(libvirt_text(OPTIONS))
    channel, filesystem = domain.find("devices/channel"), domain.find("devices/filesystem")
    assert channel is not None
    assert filesystem is not None
    source, target = channel.find("source"), channel.find("target")
    assert source is not None
    assert target is not None
    assert source.attrib == {"mode": "connect", "path": "/run/coherency/work/control.sock"}
    assert target.attrib == {"type": "virtio", "name": "coherency.0"}
    assert [each.attrib["dir"] for each in filesystem if "dir" in each.attrib] == ["/run/coherency/work/vm", "coherency-work"]
    arguments = [each.attrib["value"] for each in domain.iter(f"{QEMU_NS}arg")]
    assert arguments[:3] == [*OPTIONS.table_options()[0], "-device"]
    assert "readonly=on" in arguments[1]
    assert json.loads(arguments[3]) == {"driver": "ivshmem-plain", "memdev": "coherency-work-table"}


@pytest.mark.parametrize(
    ("said", "reconnect"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c)", "reconnect=1"),
        ("QEMU emulator version 9.1.3", "reconnect=1"),
        ("QEMU emulator version 9.2.0", "reconnect-ms=1000"),
        ("QEMU emulator version 10.2.0 (qemu-10.2.0-1.fc44)", "reconnect-ms=1000"),
        ("", "reconnect=1"),
    ],
)
def test_how_qemu_is_told_to_connect_again_depends_on_its_version(said: str, reconnect: str) -> None:
    options = replace(OPTIONS, qemu_version=qemu_version(said))
    assert f"socket,id=coherency-work-control,path=/run/coherency/work/control.sock,{reconnect}" in words(qemu_text(options))


def test_another_port_is_named_on_both_sides() -> None:
    options = replace(OPTIONS, port="coherency.1")
    assert "name=coherency.1" in qemu_text(options)
    assert "--control virtio-serial:coherency.1 " in options.mount_command


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a,b"}, {"guest": "vm 1"}, {"guest": ""}, {"port": "a=b"}, {"memory": "much"}, {"memory": "512M,share=off"},
        {"runtime_root": "/run/a,readonly=off"}, {"runtime_root": "/run/a b"}, {"runtime_root": "/run/$a"},
    ],
)  # fmt: skip
def test_what_would_become_another_option_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        replace(OPTIONS, **change)  # type: ignore[arg-type]


def test_a_path_that_is_too_long_for_a_socket_is_refused() -> None:
    room = 107 - len("/run/coherency/work-.virtiofs")
    assert len(replace(OPTIONS, guest="g" * min(room, 64)).virtiofsd_socket) <= 107
    with pytest.raises(UsageError, match="too long for a socket, by 1 bytes"):
        replace(OPTIONS, runtime_root="/" + "r" * (107 - len("/work/control.sock")))

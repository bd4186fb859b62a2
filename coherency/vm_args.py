"""The options with which QEMU, or libvirt, makes a virtual machine a guest of a daemon: pure, from names and numbers to text.

Three things go into the machine, each through something that QEMU has anyway:

* the version table, as a PCI device whose memory the guest can read and cannot change (ivshmem-plain);
* the control channel, as a virtio-serial port that is connected to the daemon's control socket;
* the export, by virtiofs: virtiofsd serves it, or the window in which it is seen, and the machine caches nothing of it.

What is in virtiofs' hands is shared memory of the guest: it needs a memory backend that virtiofsd can map.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import quoteattr

from coherency.errors import UsageError
from coherency.rendezvous import (
    CONTROL_SOCKET_NAME,
    EXPORT_DIRECTORY_NAME,
    TABLE_LINK_NAME,
    VIRTIO_PORT_NAME,
    WINDOW_DIRECTORY_NAME,
    check_share_name,
)

FORMATS: Final = ("qemu", "libvirt")
DEFAULT_MEMORY: Final = "512M"
OLDEST_QEMU: Final = (7, 2)
_RECONNECT_MS_SINCE: Final = (9, 2)
"""Of QEMU: `reconnect`, in seconds, is deprecated from here on, and gone since 10.2."""
_LONGEST_SOCKET_PATH: Final = 107
_MEMORY: Final = re.compile(r"[1-9][0-9]*[KMGT]?")
_THREADS: Final = 64
"""Requests that virtiofsd works on at a time: with one, a change that waits for its own guest's ack would keep that from coming."""
_LEGACY_VIRTIOFSD: Final = "/usr/lib/qemu/"
"""Where the virtiofsd lies that came with QEMU up to 7.2; it has options of its own."""
_ONE_ARENA: Final = "MALLOC_ARENA_MAX=1"
"""For the same: with several, glibc 2.36 asks for the number of processors (sched_getaffinity) when a thread of the pool first
needs memory, which that virtiofsd's seccomp filter punishes with death; its guest's requests are never answered then."""


@dataclass(frozen=True)
class VirtualMachineOptions:
    """What is asked for.  Raises `UsageError` if a name or a size is none.

    `guest` is what the daemon shall call the machine; `table_bytes` the size of the daemon's table; `has_window` whether there is
    one that outlives the daemon, see `daemon.window`; `virtiofsd` the program of that name; `qemu_version` that of the QEMU which gets
    the options.
    """

    name: str
    guest: str
    runtime_root: str
    table_bytes: int
    has_window: bool
    virtiofsd: str
    memory: str = DEFAULT_MEMORY
    port: str = VIRTIO_PORT_NAME
    qemu_version: tuple[int, int] = OLDEST_QEMU

    def __post_init__(self) -> None:
        for each in (self.name, self.guest):
            check_share_name(each)  # it becomes part of names in QEMU, which are no freer
        check_share_name(self.port)
        if not _MEMORY.fullmatch(self.memory):
            raise UsageError(f"--memory is a size like 512M or 2G, not {self.memory!r}")
        if "," in self.runtime_root or shlex.quote(self.runtime_root) != self.runtime_root:
            raise UsageError(f"--runtime-dir has something in it at which QEMU or a shell would split it: {self.runtime_root}")
        for socket in (self.control, self.virtiofsd_socket):
            if len(socket) > _LONGEST_SOCKET_PATH:
                raise UsageError(
                    f"{socket} is too long for a socket, by {len(socket) - _LONGEST_SOCKET_PATH} bytes: take a shorter --guest or "
                    "--runtime-dir"
                )

    @property
    def directory(self) -> str:
        """The daemon's."""
        return f"{self.runtime_root}/{self.name}"

    @property
    def control(self) -> str:
        """Its socket."""
        return f"{self.directory}/{CONTROL_SOCKET_NAME}"

    @property
    def shared(self) -> str:
        """What virtiofsd serves."""
        return f"{self.directory}/{WINDOW_DIRECTORY_NAME if self.has_window else EXPORT_DIRECTORY_NAME}"

    @property
    def virtiofsd_socket(self) -> str:
        """Where virtiofsd listens for this machine, which must be a place of the operator's own."""
        return f"{self.runtime_root}/{self.name}-{self.guest}.virtiofs"

    @property
    def tag(self) -> str:
        """What the machine mounts."""
        return f"coherency-{self.name}"[:36]  # as long as the tag of a virtio file system may be

    @property
    def mount_command(self) -> str:
        """What root types in the machine."""
        port = "" if self.port == VIRTIO_PORT_NAME else f":{self.port}"
        return (
            f"coherency mount {self.name} /mnt/{self.name} --lower /mnt/share --table pci --control virtio-serial{port} "
            f"--guest {self.guest}"
        )

    @property
    def virtiofsd_command(self) -> list[str]:
        """What root starts on the host before the machine, and again with each start of it: it ends with its machine."""
        shared, socket = self.shared, self.virtiofsd_socket
        threads = f"--thread-pool-size={_THREADS}"
        if self.virtiofsd.startswith(_LEGACY_VIRTIOFSD):
            program = ["env", _ONE_ARENA, self.virtiofsd]
            return [*program, f"--socket-path={socket}", threads, "-o", f"source={shared},cache=none,xattr"]
        return [self.virtiofsd, f"--socket-path={socket}", threads, f"--shared-dir={shared}", "--cache=never", "--xattr"]

    def qemu(self) -> list[list[str]]:
        """The options, each with its value."""
        prefix = f"coherency-{self.name}"
        reconnect = "reconnect-ms=1000" if self.qemu_version >= _RECONNECT_MS_SINCE else "reconnect=1"
        return [
            ["-object", f"memory-backend-memfd,id={prefix}-memory,size={self.memory},share=on"],
            ["-numa", f"node,memdev={prefix}-memory"],
            ["-m", self.memory],
            *self.table_options(),
            ["-device", f"virtio-serial-pci,id={prefix}-serial"],
            ["-chardev", f"socket,id={prefix}-control,path={self.control},{reconnect}"],
            ["-device", f"virtserialport,bus={prefix}-serial.0,chardev={prefix}-control,name={self.port}"],
            ["-chardev", f"socket,id={prefix}-share,path={self.virtiofsd_socket}"],
            ["-device", f"vhost-user-fs-pci,chardev={prefix}-share,tag={self.tag}"],
        ]

    def table_options(self, *, device_as_json: bool = False) -> list[list[str]]:
        """Those of them that show the version table to the machine, read-only.

        libvirt gives each of its devices an address on the PCI bus, and describes them in JSON. QEMU makes all devices that are
        described otherwise first, and gives them the first addresses that are free: one of libvirt's own would be taken.
        """
        prefix = f"coherency-{self.name}"
        device = {"driver": "ivshmem-plain", "memdev": f"{prefix}-table"}
        size = f"size={self.table_bytes},share=on,readonly=on,mem-path={self.directory}/{TABLE_LINK_NAME}"
        return [
            ["-object", f"memory-backend-file,id={prefix}-table,{size}"],
            ["-device", json.dumps(device) if device_as_json else f"ivshmem-plain,memdev={prefix}-table"],
        ]

    def hints(self, *, starts_virtiofsd: bool) -> list[str]:
        """What else there is to do, for people. libvirt starts virtiofsd by itself."""
        lines = [f"The machine '{self.guest}' as a guest of '{self.name}'."]
        if starts_virtiofsd:
            lines += ["On the host, as root, before each start of the machine:", f"  {shlex.join(self.virtiofsd_command)}"]
        directories, virtiofs = f"mkdir -p /mnt/share /mnt/{self.name}", f"mount -t virtiofs {self.tag} /mnt/share"
        return [*lines, "In the machine, as root:", *(f"  {each}" for each in (directories, virtiofs, self.mount_command))]


def qemu_version(text: str) -> tuple[int, int]:
    """The version in what ``qemu-system-x86_64 --version`` prints; the oldest that is possible if there is none."""
    found = re.search(r"version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else OLDEST_QEMU


def qemu_text(options: VirtualMachineOptions) -> str:
    """The options, one with its value on each line, as a shell reads them; the hints are comments."""
    lines = [f"# {line}" for line in options.hints(starts_virtiofsd=True)]
    lines += [shlex.join(each) for each in options.qemu()]
    return "\n".join(lines) + "\n"


def libvirt_text(options: VirtualMachineOptions) -> str:
    """The parts of a domain. libvirt starts virtiofsd by itself; its own shmem device cannot be read-only, hence the arguments."""
    arguments = [each for pair in options.table_options(device_as_json=True) for each in pair]
    lines = [
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>",
        "  <memoryBacking>",
        "    <source type='memfd'/>",
        "    <access mode='shared'/>",
        "  </memoryBacking>",
        "  <devices>",
        "    <channel type='unix'>",
        f"      <source mode='connect' path={quoteattr(options.control)}>",
        "        <reconnect enabled='yes' timeout='1'/>",
        "      </source>",
        f"      <target type='virtio' name={quoteattr(options.port)}/>",
        "    </channel>",
        "    <filesystem type='mount' accessmode='passthrough'>",
        "      <driver type='virtiofs'/>",
        f"      <binary path={quoteattr(options.virtiofsd)} xattr='on'>",
        "        <cache mode='none'/>",
        f"        <thread_pool size='{_THREADS}'/>",
        "      </binary>",
        f"      <source dir={quoteattr(options.shared)}/>",
        f"      <target dir={quoteattr(options.tag)}/>",
        "    </filesystem>",
        "  </devices>",
        "  <qemu:commandline>",
        *[f"    <qemu:arg value={quoteattr(each)}/>" for each in arguments],
        "  </qemu:commandline>",
        "</domain>",
    ]
    return "\n".join(lines) + "\n"

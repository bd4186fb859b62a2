"""What the kernel of a guest starts from: busybox, a few modules, and a script that makes the host's root its own.

1. Root is the host's root, over virtiofs and read-only, under an overlay in memory: everything can be read and written
   in the guest, and nothing of that reaches the host. So the guest has the interpreter and the packages of the tests.
2. Nothing is asked of the guest's console; what goes wrong is said there.
"""

import gzip
import shlex
import stat
from collections.abc import Iterator, Sequence

from tests.vm import parts

ROOT_TAG = "root"
SHARES = "/mnt"
"""Below it, a directory for each tag: where the guest mounts a share."""

_SCRIPT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /host /memory /root
/bin/busybox --install -s /bin
fail() {{ echo "vm: $*"; poweroff -f; }}
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev || fail "no kernel file systems"
for module in {modules}; do insmod /modules/$module.ko || fail "no module $module"; done
mount -t virtiofs -o ro {root_tag} /host || fail "no root"
mount -t tmpfs memory /memory && mkdir /memory/upper /memory/work || fail "no memory"
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /root || fail "no overlay"
for name in proc sys dev; do mount -o move /$name /root/$name || fail "no /$name"; done
mount -t tmpfs run /root/run || fail "no /run"
# A symbolic link of the host's, to /run, must not lead nowhere.
mkdir -p /root/dev/shm /root/run/lock && mount -t tmpfs shm /root/dev/shm
for tag in {shares}; do
    mkdir -p /root{below}/$tag && mount -t virtiofs $tag /root{below}/$tag || fail "no share $tag"
done
echo "vm: starting"
chroot /root /usr/bin/env -i {environment} {command}
fail "the runner has ended with $?"
"""


def script(shares: Sequence[str], command: Sequence[str], environment: dict[str, str]) -> str:
    """The first program of a guest, which ends in `command`."""
    return _SCRIPT.format(
        modules=" ".join(parts.MODULES),
        root_tag=ROOT_TAG,
        shares=" ".join(shares),
        below=SHARES,
        environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
        command=shlex.join(command),
    )


def pack(init: str) -> bytes:
    """The compressed archive with `init` as the first program."""
    files = [("bin/busybox", parts.BUSYBOX.read_bytes()), ("init", init.encode())]
    files += [(f"modules/{name}.ko", parts.module(name).read_bytes()) for name in parts.MODULES]
    archive = b"".join([
        *(_entry(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "modules")),
        *(_entry(name, stat.S_IFREG | 0o755, content) for name, content in files),
        *_entries_end(),
    ])  # fmt: skip
    return gzip.compress(archive, compresslevel=1)


def _entry(name: str, mode: int, content: bytes) -> bytes:
    """One file of an archive (source: cpio "newc", buffer-format.rst in the kernel's documentation)."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return _padded(head) + _padded(content)


def _entries_end() -> Iterator[bytes]:
    yield _entry("TRAILER!!!", 0, b"")


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)

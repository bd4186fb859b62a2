"""The process that echoes: it makes system calls in the mount whose only effect is that the kernel tells programs that watch.

The agent answers its requests without forwarding any (``echoes``). Rules:

1. It keeps no descriptor of the mount, nor its working directory there between two jobs: ``umount`` must not find them there.
2. It takes orders from the other end of one socket, and ends with that, or with the thread that started it.
3. It touches nothing that does not lie on the mount, whatever is mounted on a name.

Only the standard library, and little of it, like ``keeper``.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import struct
import sys
from typing import Final

from coherency.fuse import syscalls
from coherency.guest_agent.keeper import enter, open_node

MAX_JOB_BYTES: Final = 1024

# A job is this, and the names one after the other; the answer is an errno, or 0.
job: Final = struct.Struct("=BQQBB")  # what to do, two nodes, the lengths of two names
answer: Final = struct.Struct("=I")

# What to do: in the first node with the first name, or with the first node itself if there is no name.
MAKE_FILE: Final = 1
MAKE_DIRECTORY: Final = 2
REMOVE_FILE: Final = 3
REMOVE_DIRECTORY: Final = 4
MOVE: Final = 5  # to the second node, under the second name
LINK: Final = 6  # the second node
MODIFY: Final = 7
SET_ATTRIBUTES: Final = 8

XATTR: Final = b"trusted.coherency.echo"
"""What is set, and never stored: setting an attribute changes nothing of what the kernel has of an inode, unlike chmod."""

_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # sent to whole groups; the agent decides
_O_THING: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OMIT: Final = (0, syscalls.UTIME_OMIT)
_NOW: Final = (0, syscalls.UTIME_NOW)


def serve(orders: int, mountpoint: bytes, connection: int) -> None:
    """Say that there is somebody, then do jobs until the other end is closed."""
    os.write(orders, answer.pack(0))
    while message := os.read(orders, MAX_JOB_BYTES):
        what, first, second, length, new_length = job.unpack_from(message)
        names = message[job.size :]
        number = 0
        try:
            enter(mountpoint, connection)
            _do(what, (first, names[:length]), (second, names[length : length + new_length]), connection)
        except OSError as error:
            number = error.errno or errno.EIO
        finally:
            os.chdir(b"/")
        os.write(orders, answer.pack(number))


def _do(what: int, place: tuple[int, bytes], new_place: tuple[int, bytes], connection: int) -> None:
    (node, name), (new_node, new_name) = place, new_place
    at = _opened(node)
    try:
        if what == MAKE_FILE:
            os.mknod(name, stat.S_IFREG | stat.S_IRUSR, dir_fd=at)
        elif what == MAKE_DIRECTORY:
            os.mkdir(name, dir_fd=at)
        elif what == REMOVE_FILE:
            os.unlink(name, dir_fd=at)
        elif what == REMOVE_DIRECTORY:
            os.rmdir(name, dir_fd=at)
        elif what in (MOVE, LINK):
            other = _opened(new_node)
            try:
                if what == MOVE:
                    syscalls.renameat2(at, name, other, new_name, 0)
                else:
                    os.link(syscalls.proc_path(other), name, dst_dir_fd=at, follow_symlinks=True)
            finally:
                os.close(other)
        elif name:
            thing = os.open(name, _O_THING, dir_fd=at)
            try:
                _touch(what, thing, connection)
            finally:
                os.close(thing)
        else:
            _touch(what, at, connection)
    finally:
        os.close(at)


def _opened(node: int) -> int:
    fd = open_node(node)
    if fd < 0:
        raise OSError(errno.ESTALE, "the kernel does not know it any more")
    return fd


def _touch(what: int, thing: int, connection: int) -> None:
    if syscalls.cached_device(thing) != connection:
        raise OSError(errno.EBUSY, "something is mounted there")
    if what == MODIFY:  # one time alone is taken for writing, both for a change of attributes
        syscalls.utimens(thing, _OMIT, _NOW)
    else:
        os.setxattr(syscalls.proc_path(thing), XATTR, b"")


def main() -> None:
    """Arguments: the descriptor of orders, the agent, the mount point, the connection."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    syscalls.die_with_parent(signal.SIGKILL)
    if os.getppid() == int(sys.argv[2]):  # else it has died before
        serve(int(sys.argv[1]), os.fsencode(sys.argv[3]), int(sys.argv[4]))

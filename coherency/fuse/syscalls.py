"""System calls that Python's ``os`` does not offer, as functions that raise ``OSError``.

Every function works on descriptors and single names, never on paths that somebody else may have changed meanwhile;
``/proc/self/fd/N`` (:func:`proc_path`) stands for a descriptor where the kernel insists on a path. All of them release
the GIL while they run. Source: the man page of the same name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_NO_AUTOMOUNT: Final = 0x800
AT_STATX_FORCE_SYNC: Final = 0x2000
AT_STATX_DONT_SYNC: Final = 0x4000
AT_STATX_SYNC_TYPE: Final = 0x6000
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
MS_NODEV: Final = 4
MS_BIND: Final = 4096
MS_SHARED: Final = 1 << 20
MNT_FORCE: Final = 1
MNT_DETACH: Final = 2
CLONE_FS: Final = 0x200
STATX_INO: Final = 0x100
STATX_BASIC_STATS: Final = 0x7FF
STATX_BTIME: Final = 0x800
STATX_BYTES: Final = 256
OFFSET_MAX: Final = (1 << 63) - 1
CAP_SYS_RESOURCE: Final = 24

_SYS_GETDENTS64: Final = 217
_SYS_OPEN_TREE: Final = 428
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_BENEATH: Final = 0x08
_OPEN_TREE_CLONE: Final = 1
_PR_SET_PDEATHSIG: Final = 1
_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28
_SECBIT_NO_SETUID_FIXUP: Final = 1 << 2
_CAPABILITY_VERSION_3: Final = 0x20080522
_HANDLE_BYTES: Final = 128
_handle_head = struct.Struct("=Ii")
_timespecs = struct.Struct("=qqqq")
_timespec = struct.Struct("=qq")
_open_how = struct.Struct("=QQQ")
_STATX_INO_OFFSET: Final = 32
_STATX_MINOR_OFFSET: Final = 140
_STATX_ATTRIBUTES_OFFSET: Final = 8
_STATX_ATTR_MOUNT_ROOT: Final = 0x2000
_pollfd = struct.Struct("=ihh")
_capability_header = struct.Struct("=Ii")  # version pid
_capability_sets = struct.Struct("=6I")  # effective permitted inheritable, of the lower 32 capabilities, then of the upper
_flock_layout = struct.Struct("=hh4xqqi4x")  # l_type l_whence l_start l_len l_pid
_sigaction_layout = struct.Struct("=Q128xi4xQ")  # sa_handler, no sa_mask, sa_flags sa_restorer
_POLLIN: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)
_c_int, _c_uint, _c_long = ctypes.c_int, ctypes.c_uint, ctypes.c_long
_c_char_p, _c_void_p, _c_off = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64


def _declare(name: str, *argtypes: Any, restype: Any = _c_int) -> Any:
    function = getattr(_libc, name)
    function.argtypes, function.restype = argtypes, restype
    return function


_mount = _declare("mount", _c_char_p, _c_char_p, _c_char_p, ctypes.c_ulong, _c_char_p)
_umount2 = _declare("umount2", _c_char_p, _c_int)
_renameat2 = _declare("renameat2", _c_int, _c_char_p, _c_int, _c_char_p, _c_uint)
_fchownat = _declare("fchownat", _c_int, _c_char_p, _c_uint, _c_uint, _c_int)
_utimensat = _declare("utimensat", _c_int, _c_char_p, _c_char_p, _c_int)
_statx = _declare("statx", _c_int, _c_char_p, _c_int, _c_uint, _c_void_p)
_fallocate = _declare("fallocate", _c_int, _c_int, _c_off, _c_off)
_syncfs = _declare("syncfs", _c_int)
_unshare = _declare("unshare", _c_int)
_prctl = _declare("prctl", _c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_capget = _declare("capget", _c_char_p, _c_char_p)
_capset = _declare("capset", _c_char_p, _c_char_p)
_setfsuid = _declare("setfsuid", _c_uint)
_setfsgid = _declare("setfsgid", _c_uint)
_name_to_handle_at = _declare("name_to_handle_at", _c_int, _c_char_p, _c_void_p, _c_void_p, _c_int)
_open_by_handle_at = _declare("open_by_handle_at", _c_int, _c_void_p, _c_int)
_ppoll = _declare("ppoll", _c_char_p, ctypes.c_ulong, _c_char_p, _c_void_p)
_fcntl = _declare("fcntl", _c_int, _c_int, _c_char_p)
_flock = _declare("flock", _c_int, _c_int)
_sigaction = _declare("sigaction", _c_int, _c_char_p, _c_void_p)
_getdents = _declare("syscall", _c_long, _c_long, _c_void_p, _c_long, restype=_c_long)

# The C library has one ``syscall``; another object for it, since the argument types belong to the object.
_openat2 = ctypes.CDLL(None, use_errno=True).syscall
_openat2.argtypes, _openat2.restype = (_c_long, _c_long, _c_char_p, _c_char_p, ctypes.c_size_t), _c_long

_open_tree = ctypes.CDLL(None, use_errno=True).syscall
_open_tree.argtypes, _open_tree.restype = (_c_long, _c_long, _c_char_p, _c_long), _c_long


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def proc_path(fd: int) -> bytes:
    """The path that names exactly the object behind ``fd``, whatever its name is now."""
    return b"/proc/self/fd/%d" % fd


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    _check(_mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, os.fsencode(options)))


def umount(target: str, flags: int = 0) -> None:
    _check(_umount2(os.fsencode(target), flags))


def renameat2(old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int) -> None:
    _check(_renameat2(old_dir, old_name, new_dir, new_name, flags))


def chown(fd: int, uid: int, gid: int) -> None:
    """Change the owner of what ``fd`` (O_PATH is enough) refers to; -1 leaves one as it is. Symlinks are not followed."""
    _check(_fchownat(fd, b"", uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW))


def utimens(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set both times of what ``fd`` (O_PATH is enough) refers to, as (seconds, nanoseconds or UTIME_NOW or UTIME_OMIT)."""
    _check(_utimensat(AT_FDCWD, proc_path(fd), _timespecs.pack(*atime, *mtime), 0))


def statx(fd: int, mask: int, flags: int = 0, name: bytes = b"") -> bytes:
    """The kernel's ``struct statx`` (256 bytes) of what ``fd`` refers to, or of ``name`` in that directory."""
    buffer = ctypes.create_string_buffer(STATX_BYTES)
    _check(_statx(fd, name, flags | AT_EMPTY_PATH, mask, buffer))
    return buffer.raw


def is_mount_root(answer: bytes) -> bool:
    """Whether a ``struct statx`` is about the root of a mount (Linux 5.8 and later tell)."""
    return bool(int.from_bytes(answer[_STATX_ATTRIBUTES_OFFSET:][:8], sys.byteorder) & _STATX_ATTR_MOUNT_ROOT)


def cached_device(fd: int) -> int:
    """The minor number of the device that ``fd`` is on, without asking a remote or FUSE server."""
    minor: int = struct.unpack_from("=I", statx(fd, 0, AT_STATX_DONT_SYNC), _STATX_MINOR_OFFSET)[0]
    return minor


def cached_inode(fd: int) -> int:
    """The inode number behind ``fd`` without asking a remote or FUSE server: what the kernel already knows."""
    ino: int = struct.unpack_from("=Q", statx(fd, STATX_INO, AT_STATX_DONT_SYNC), _STATX_INO_OFFSET)[0]
    return ino


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(_fallocate(fd, mode, offset, length))


def syncfs(fd: int) -> None:
    _check(_syncfs(fd))


def getdents(fd: int, size_bytes: int) -> bytes:
    """The next ``struct linux_dirent64`` records of an open directory, at most ``size_bytes``; empty at its end."""
    buffer = ctypes.create_string_buffer(size_bytes)
    count = _check(_getdents(_SYS_GETDENTS64, fd, ctypes.addressof(buffer), size_bytes))
    return buffer.raw[:count] if count < size_bytes // 2 else ctypes.string_at(buffer, count)


def file_handle(fd: int) -> bytes | None:
    """The file handle of what ``fd`` refers to (survives closing it), or None where the file system has none."""
    buffer = ctypes.create_string_buffer(_handle_head.size + _HANDLE_BYTES)
    _handle_head.pack_into(buffer, 0, _HANDLE_BYTES, 0)
    mount_id = _c_int()
    if _name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), AT_EMPTY_PATH) < 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EOVERFLOW):
            return None
        raise OSError(number, os.strerror(number))
    length = _handle_head.unpack_from(buffer)[0]
    return buffer.raw[: _handle_head.size + length]


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open what :func:`file_handle` described; ESTALE if it is gone.

    ``mount_fd``: any descriptor of that file system, not O_PATH; AT_FDCWD for a working directory there.
    """
    buffer = ctypes.create_string_buffer(handle, len(handle))
    return _check(_open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC))


def private_umask_and_cwd() -> None:
    """Give the calling thread an umask and a working directory of its own (``unshare(CLONE_FS)``)."""
    _check(_unshare(CLONE_FS))


def keep_capabilities_across_setfsuid() -> None:
    """From now on :func:`set_fs_ids` of this thread changes the ids only, not its capabilities (needs CAP_SETPCAP)."""
    bits = _check(_prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0))
    _check(_prctl(_PR_SET_SECUREBITS, bits | _SECBIT_NO_SETUID_FIXUP, 0, 0, 0))


def set_fs_ids(uid: int, gid: int) -> None:
    """Who the calling thread is when it creates files. The calls report no errors; asking again tells whether they worked."""
    _setfsgid(gid)
    _setfsuid(uid)
    if _setfsuid(uid) != uid or _setfsgid(gid) != gid:
        raise PermissionError(errno.EPERM, f"cannot act as uid {uid}, gid {gid}: CAP_SETUID and CAP_SETGID are needed")


def drop_capability(number: int) -> None:
    """The calling thread, and each that it starts from now on, is without this capability (one of the lower 32)."""
    header = ctypes.create_string_buffer(_capability_header.pack(_CAPABILITY_VERSION_3, 0), _capability_header.size)
    sets = ctypes.create_string_buffer(_capability_sets.size)
    _check(_capget(header, sets))
    effective, permitted, *others = _capability_sets.unpack(sets.raw)
    kept = ~(1 << number)
    _check(_capset(header, _capability_sets.pack(effective & kept, permitted & kept, *others)))


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open ``path`` below ``directory`` (empty: itself), through real directories only: a symlink on the way is ELOOP."""
    how = _open_how.pack(flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS)
    return _check(_openat2(_SYS_OPENAT2, directory, path or b".", how, len(how)))


def clone_mount(directory: int) -> int:
    """A mount of ``directory`` that lies nowhere, and on which nothing is mounted; it is gone when the descriptor is closed."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH
    return _check(_open_tree(_SYS_OPEN_TREE, directory, b"", flags))


def die_with_parent(number: int) -> None:
    """The calling process gets this signal when the thread that forked it ends."""
    _check(_prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def wait_readable(fds: Sequence[int], timeout_ns: int) -> list[int]:
    """Those of ``fds`` that can be read, or whose other end is gone; waits until there is one, at most ``timeout_ns``.

    Unlike ``select.poll`` it counts in nanoseconds, unlike ``select.select`` it takes any descriptor.
    """
    entries = ctypes.create_string_buffer(b"".join([_pollfd.pack(fd, _POLLIN, 0) for fd in fds]))
    count = _ppoll(entries, len(fds), _timespec.pack(*divmod(max(timeout_ns, 0), 1_000_000_000)), None)
    if count < 0 and ctypes.get_errno() != errno.EINTR:
        _check(count)
    return [fd for fd, _, happened in _pollfd.iter_unpack(entries.raw[:-1]) if happened] if count > 0 else []


# ---- what may wait for somebody else; unlike Python's, these end with InterruptedError when a signal comes ----


def lock(fd: int, command: int, kind: int, start: int, end: int) -> tuple[int, int, int]:
    """fcntl(2) with a lock command, for bytes ``start`` to ``end`` (OFFSET_MAX: all there may ever be).

    Returns kind, start and end as they are afterwards, which is the answer to F_OFD_GETLK.
    """
    length = 0 if end == OFFSET_MAX else end - start + 1
    description = _flock_layout.pack(kind, os.SEEK_SET, start, length, 0)
    buffer = ctypes.create_string_buffer(description, len(description))
    _check(_fcntl(fd, command, buffer))
    kind, _, start, length, _ = _flock_layout.unpack(buffer.raw)
    return kind, start, start + length - 1 if length else OFFSET_MAX


def flock(fd: int, operation: int) -> None:
    _check(_flock(fd, operation))


def let_signal_interrupt(number: int) -> None:
    """From now on this signal does nothing, except that it ends what a thread waits for.

    In any thread, and without the interpreter: Python's own handlers are installed and run by the main thread. abs(3) does
    nothing to its argument that anybody sees.
    """
    handler = ctypes.cast(_libc.abs, _c_void_p).value
    _check(_sigaction(number, _sigaction_layout.pack(handler, 0, 0), None))

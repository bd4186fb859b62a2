"""The only door to shared memory: sealed memfds, POSIX shared-memory objects, read-only mappings.

It knows bytes, not fields.  Rules:

1. The owner maps first and seals then.  After that nobody, the owner included, can map a memfd writable, write to it,
   or change its size: the owner's one mapping is the only way in.  It ends with the owner: a sealed memfd that outlives
   its daemon can still be read, but not be adopted.
2. Others get a descriptor opened read-only.  It is the seals that protect a memfd: /proc lets its holder open it again.
3. A reader maps a memfd only if it cannot shrink: reading beyond its end would kill the reader with SIGBUS.
4. A POSIX object cannot be sealed.  Its file mode keeps others from writing; its owner's user and root are trusted.
5. In a virtual machine the memory is a region of a PCI device (BAR), found in sysfs.  It cannot shrink; whoever may map it
   is trusted not to write, and what is written there does not reach the host, which gave it to the device read-only.
6. An existing POSIX object is taken over only if nobody but its owner could ever have opened it for writing.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

import posix_ipc

from coherency.errors import TableError, UnsupportedPlatform

# Missing in Python 3.11's fcntl and os (linux/fcntl.h, linux/memfd.h).
F_SEAL_FUTURE_WRITE: Final = 0x10
MFD_NOEXEC_SEAL: Final = 0x8

TABLE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
POSIX_MODE: Final = 0o440
_POSIX_DIRECTORY: Final = "/dev/shm"  # noqa: S108 (no temporary file: glibc keeps the objects of shm_open there)
_WRITABLE_BY_OTHERS: Final = 0o022


class MemoryStatistics(NamedTuple):
    """How much memory there is, and how much of it is in use."""

    size_bytes: int
    allocated_bytes: int
    """Pages that were ever touched, by the owner or by readers."""


class OwnedMemory:
    """Writable memory whose owner is this process.  Made by `create_memfd` and `create_posix`."""

    def __init__(self, fd: int, size_bytes: int, *, path: str, posix_name: str | None, existed: bool) -> None:
        """Map `fd` writable and take it over: `close` closes it."""
        self.fd = fd
        self.size_bytes = size_bytes
        self.path = path
        """Where another process of this machine can open the memory read-only, as long as this process lives."""
        self.existed = existed
        """Whether the memory was there before, with contents to be adopted; otherwise it is all zero."""
        self._posix_name = posix_name
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.words = memoryview(self._map).cast("Q")

    def read_only_fd(self) -> int:
        """Return a new descriptor, opened read-only and close-on-exec; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def unlink(self) -> None:
        """Remove the name of a POSIX object; who has it open or mapped keeps it.  Nothing happens with a memfd.

        A name that is gone already, or has been given to another object, is left alone.
        """
        if self._posix_name is not None and _is_same_file(self.fd, self.path):
            _unlink_posix(self._posix_name)

    def close(self) -> None:
        """Release `words` and the descriptor.  May be called twice.  Readers keep their mappings.

        The memory is unmapped when the last view that was made of `words` is gone; a thread that still uses `words`
        itself gets `ValueError`.
        """
        if self.fd >= 0:
            _release(self.words, self._map)
            os.close(self.fd)
            self.fd = -1

    def statistics(self) -> MemoryStatistics:
        """Return the size and the memory in use.  Raises `OSError` (EBADF) once closed."""
        return _statistics(self.fd)

    def check(self) -> None:
        """Raise `AssertionError` if the memory has another size, or other rights, than it was given."""
        status = os.fstat(self.fd)
        if status.st_size != self.size_bytes:
            raise AssertionError(f"the memory has {status.st_size} bytes instead of {self.size_bytes}")
        if self._posix_name is None:
            if _seals_of(self.fd) & TABLE_SEALS != TABLE_SEALS:
                raise AssertionError(f"seals are missing: {_seals_of(self.fd):#x}")
        elif stat.S_IMODE(status.st_mode) != POSIX_MODE:
            raise AssertionError(f"the mode is {stat.S_IMODE(status.st_mode):#o}")


class MappedMemory:
    """A read-only mapping of somebody else's memory.  Made by `map_read_only`.

    Dropping the object is enough: the memory is unmapped when neither it nor any view of `words` is left.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Map `size_bytes` of `fd` read-only; `fd` stays the caller's."""
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self.words = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Release `words` now.  May be called twice.  A thread that still reads them gets `ValueError`."""
        _release(self.words, self._map)


def create_memfd(name: str, size_bytes: int) -> OwnedMemory:
    """Return fresh, zeroed, sealed anonymous memory (rules 1 and 2).  `name` is for the eyes of /proc readers only.

    No page is touched.  Raises `UnsupportedPlatform` before Linux 5.1, which cannot seal like this.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)  # before Linux 6.3
    try:
        os.ftruncate(fd, size_bytes)
        path = f"/proc/{os.getpid()}/fd/{fd}"
        memory = OwnedMemory(fd, size_bytes, path=path, posix_name=None, existed=False)
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, TABLE_SEALS)
        except OSError as error:
            raise UnsupportedPlatform(f"this kernel cannot seal shared memory: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    return memory


def create_posix(name: str, size_bytes: int, *, gid: int | None = None) -> OwnedMemory:
    """Return the POSIX shared-memory object `name` ("/..."), mode 0440, group `gid` if one is given.

    An object of that name is taken over (`existed`) if it has the same size, is ours, and could not be written by
    others (rule 6); otherwise it is unlinked, and a new one made.  Its readers then keep the abandoned memory.  The
    caller makes sure, by a lock on something else, that no living daemon serves from it.  Raises `OSError` if the name
    belongs to another user, and `ValueError` if it is no name of an object.
    """
    if not name.startswith("/") or len(name) < 2 or "/" in name[1:] or name in ("/.", "/..") or "\0" in name:
        raise ValueError(f"not a name for a shared-memory object: {name!r}")
    fd = _open_existing_posix(name, size_bytes)
    existed = fd is not None
    if fd is None:
        with contextlib.suppress(posix_ipc.ExistentialError):
            _unlink_posix(name)
        try:
            fd = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size_bytes).fd
        except posix_ipc.ExistentialError as error:
            raise FileExistsError(errno.EEXIST, "shared-memory object appeared meanwhile", name) from error
    try:
        os.set_inheritable(fd, False)
        if gid is not None:
            os.fchown(fd, -1, gid)
        os.fchmod(fd, POSIX_MODE)
        return OwnedMemory(fd, size_bytes, path=_POSIX_DIRECTORY + name, posix_name=name, existed=existed)
    except BaseException:
        os.close(fd)
        raise


def remove_posix(name: str) -> bool:
    """Remove a POSIX object; who has it mapped keeps it.  False if there was none.  Raises `OSError` if it is another user's."""
    try:
        _unlink_posix(name)
    except posix_ipc.ExistentialError:
        return False
    return True


def map_read_only(fd: int, size_bytes: int | None) -> MappedMemory:
    """Map all of `fd` read-only; `fd` may be closed afterwards.

    Raises `TableError` if it is not `size_bytes` long (None: any length), cannot be mapped, or is a memfd that could
    still shrink (rule 3).  What cannot be sealed at all (POSIX objects, PCI BARs) is taken on its owner's word.
    """
    actual_bytes = os.fstat(fd).st_size
    if size_bytes is not None and actual_bytes != size_bytes:
        raise TableError(f"the shared memory has {actual_bytes} bytes instead of {size_bytes}")
    if actual_bytes == 0 or actual_bytes % mmap.PAGESIZE:
        raise TableError(f"the shared memory is no whole number of pages: {actual_bytes} bytes")
    if _is_memfd(fd) and not _seals_of(fd) & fcntl.F_SEAL_SHRINK:
        raise TableError("the shared memory could shrink under its readers: seal F_SEAL_SHRINK is missing")
    try:
        return MappedMemory(fd, actual_bytes)
    except OSError as error:
        raise TableError(f"the shared memory cannot be mapped: {error.strerror}") from error


def pci_devices(vendor: int, device: int, root: Path) -> list[Path]:
    """The PCI devices of this kind, as directories below `root`, which is that of sysfs."""
    wanted = (vendor, device)
    return [each for each in sorted(root.glob("*")) if (_pci_id(each / "vendor"), _pci_id(each / "device")) == wanted]


def map_pci_region(device: Path, region: int, size_bytes: int) -> MappedMemory:
    """Map the beginning of a PCI device's memory region read-only; the region may be larger.

    Raises `TableError` if the device has no such memory, or it cannot be mapped.
    """
    path = device / f"resource{region}"
    try:
        _enable_pci(device / "enable")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TableError(f"the shared memory {error.filename or path} cannot be opened: {error.strerror}") from error
    try:
        actual_bytes = os.fstat(fd).st_size
        if actual_bytes < size_bytes:
            raise TableError(f"the shared memory {path} has {actual_bytes} bytes instead of {size_bytes}")
        return MappedMemory(fd, size_bytes)
    except OSError as error:
        hint = "; a kernel in lockdown mode forbids it" if error.errno == errno.EPERM else ""
        raise TableError(f"the shared memory {path} cannot be mapped: {error.strerror}{hint}") from error
    finally:
        os.close(fd)


def _pci_id(path: Path) -> int | None:
    try:
        return int(path.read_text(), 16)
    except (OSError, ValueError):
        return None


def _enable_pci(path: Path) -> None:
    """A device without a driver does not answer before it is enabled.  The kernel counts how often that was asked for."""
    if path.read_text().strip() == "0":
        path.write_text("1")


def _open_existing_posix(name: str, size_bytes: int) -> int | None:
    """Return a writable descriptor of an object that may be taken over, or None."""
    try:
        read_only = posix_ipc.SharedMemory(name, read_only=True).fd
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return None
    try:
        status = os.fstat(read_only)
        foreign = status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS
        if foreign or status.st_size != size_bytes:
            return None
        os.fchmod(read_only, 0o600)  # mode 0440 would keep even its owner from opening it for writing
        fd: int = posix_ipc.SharedMemory(name).fd
        if not os.path.sameopenfile(fd, read_only):
            os.close(fd)
            raise FileExistsError(errno.EEXIST, "shared-memory object was replaced meanwhile", name)
        return fd
    finally:
        os.close(read_only)


def _unlink_posix(name: str) -> None:
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.PermissionsError as error:
        raise PermissionError(errno.EACCES, "shared-memory object belongs to another user", name) from error


def _is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _is_memfd(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")


def _seals_of(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def _statistics(fd: int) -> MemoryStatistics:
    status = os.fstat(fd)
    return MemoryStatistics(status.st_size, status.st_blocks * 512)


def _release(words: memoryview, mapping: mmap.mmap) -> None:
    words.release()
    # A view that somebody made of `words` is still alive: the memory goes with the last of them.
    with contextlib.suppress(BufferError):
        mapping.close()

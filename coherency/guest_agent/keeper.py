"""The keeper of a mount, and the helpers that it keeps: processes of their own, since a system call may be stuck and an agent may die.

A helper stats names of the mount. The agent answers it, and only it, that the name is not there; the kernel then forgets the
name for everybody (``helper_pool`` says when). The keeper forks helpers and outlives the agent for as long as it takes to make
the dead mount harmless. Rules:

1. Neither keeps a descriptor of the mount, nor its working directory there between two jobs: ``umount`` must not find them there.
2. Both take orders from the agent's end of one socket pair each, which no other process has.
3. A helper dies with the keeper. The keeper ends when it is told to, or when the agent is dead: then it first takes from the
   kernel what that was allowed to keep, says goodbye in the agent's name, and ends the connection.
4. A dying agent is dead: killed, some of its threads may hang in system calls on the lower directory until a change is over
   that waits for this very guest. So the keeper does not wait for the end of the process, but for that of the thread that
   started it, whose signal it gets (PR_SET_PDEATHSIG), and then looks whether the process has become a zombie.
5. The keeper reaps a helper only when the agent has struck it off, so that no other process gets its number before.
6. Nothing here waits for the agent, except for orders.

Only the standard library, and little of it: this starts with every mount.
"""

from __future__ import annotations

import array
import errno
import itertools
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final, NoReturn

from coherency.fuse import syscalls
from coherency.fuse.abi import ROOT_ID, Notify

MAX_HELPERS: Final = 32
MAX_ORDER_BYTES: Final = 4096
_REAP_TIMEOUT_MS: Final = 100
_CLEANING_NS: Final = 2_000_000_000  # callers wait meanwhile; enough for half a million nodes
_NODES_AT_ONCE: Final = 256
_PARENT_ENDS: Final = signal.SIGUSR1
_ALARMS_AT_ONCE: Final = 4096
_ZOMBIE_LOOKS: Final = 50
_ZOMBIE_LOOK_S: Final = 0.001

# Orders of the agent, and what the keeper tells: one letter, then what stands behind it.
FORK: Final = b"F"  # order.pack(slot)
REAP: Final = b"R"  # order.pack(pid)
CHANNEL: Final = b"C"  # the goodbye, with the descriptor; without either: there is none any more
END: Final = b"E"
BORN: Final = b"B"  # born.pack(pid, slot), with the descriptor of its socket
DIED: Final = b"D"  # order.pack(pid)
FAILED: Final = b"X"  # born.pack(errno, slot)
order: Final = struct.Struct("=I")
born: Final = struct.Struct("=II")

# A job is this and the name; its answer one number: 0, the name is not cached (any more), or an errno.
job: Final = struct.Struct("=QQ")  # number of the job, node of the directory
answer: Final = struct.Struct("=I")

# Words of the page that agent, keeper and helpers share. A word for each helper begins at FIRST_STAGE.
HIGHEST_NODE: Final = 0
FIRST_STAGE: Final = 8
PAGE_BYTES: Final = mmap.PAGESIZE

_FILE_HANDLE: Final = struct.Struct("=IiIII")
_FILE_HANDLE_TYPE: Final = 0x81  # FILEID_INO64_GEN of fs/fuse/inode.c
_inval_inode: Final = struct.Struct("=IiQQqq")  # struct fuse_out_header, struct fuse_notify_inval_inode_out
_inc_epoch: Final = struct.pack("=IiQ", 16, Notify.INC_EPOCH, 0)
_STAT_AFRESH: Final = syscalls.AT_SYMLINK_NOFOLLOW | syscalls.AT_NO_AUTOMOUNT | syscalls.AT_STATX_FORCE_SYNC
_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # sent to whole groups; the agent decides


class Page:
    """Words that several processes write, each its own; not the table: nobody's guarantee rests on them alone."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self.words = memoryview(self._map).cast("Q")


# ---- the helper ----


def file_handle_of(node: int) -> bytes:
    """The file handle by which the kernel finds a node of a FUSE mount; see ``fuse_encode_fh``."""
    return _FILE_HANDLE.pack(12, _FILE_HANDLE_TYPE, node >> 32, node & 0xFFFFFFFF, 0)


class Helper:
    """Makes the kernel ask about a name, once for each job."""

    def __init__(self, mountpoint: bytes, connection: int, words: memoryview, slot: int) -> None:
        self._mountpoint, self._connection = mountpoint, connection
        self._words, self._stage = words, FIRST_STAGE + slot

    def serve(self, orders: int) -> None:
        """Do jobs until the other end is closed."""
        while True:
            message = os.read(orders, MAX_ORDER_BYTES)
            if not message:
                return
            number, parent = job.unpack_from(message)
            try:
                number = self._ask(number, parent, message[job.size :])
            except OSError as error:
                number = error.errno or errno.EIO
            os.write(orders, answer.pack(number))

    def _ask(self, number: int, parent: int, name: bytes) -> int:
        try:
            enter(self._mountpoint, self._connection)
            directory = open_node(parent)
            if directory < 0:
                return 0
            try:
                self._words[self._stage] = number  # from here on the directory's lock is the only one to wait for
                return self._stat(directory, name)
            finally:
                self._words[self._stage] = 0
                os.close(directory)
        finally:
            os.chdir(b"/")

    def _stat(self, directory: int, name: bytes) -> int:
        try:
            found = syscalls.statx(directory, syscalls.STATX_INO, _STAT_AFRESH, name)
            if not syscalls.is_mount_root(found):
                return errno.EEXIST
            # Something is mounted on the name. What lies below is seen on another mount, where nothing is.
            clone = syscalls.clone_mount(directory)
            try:
                syscalls.statx(clone, syscalls.STATX_INO, _STAT_AFRESH, name)
            finally:
                os.close(clone)
        except FileNotFoundError:
            return 0
        return errno.EEXIST


def enter(mountpoint: bytes, connection: int) -> None:
    """Go to where the file system is mounted, which the kernel wants to know of who opens by handle."""
    try:
        os.chdir(mountpoint)
        if syscalls.cached_device(syscalls.AT_FDCWD) == connection:
            return
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
    from coherency.fuse.mounts import mounts  # seldom needed

    for mount in mounts():  # covered, or moved; perhaps it can be seen elsewhere
        if mount.device != connection:
            continue
        os.chdir(mount.path)
        if syscalls.cached_device(syscalls.AT_FDCWD) == connection:
            return
    raise OSError(errno.ENOTCONN, "the mount cannot be reached")


def open_node(node: int) -> int:
    """A descriptor of what the kernel has as ``node`` of the working directory's file system; -1: it has none, hence nothing below."""
    try:
        return syscalls.open_by_handle(syscalls.AT_FDCWD, file_handle_of(node), os.O_PATH)
    except OSError as error:
        if error.errno == errno.ESTALE:
            return -1
        raise


# ---- the keeper ----


class Keeper:
    """See the module."""

    def __init__(self, orders: int, device: int, page: int, agent: int, mountpoint: bytes, connection: int) -> None:
        self._orders, self._device = socket.socket(fileno=orders), device
        self._mountpoint, self._connection = mountpoint, connection
        self._words = Page(page).words
        os.close(page)
        self._children: dict[int, int] = {}  # process id to pidfd
        self._channel = -1  # a socket, or a serial port
        self._goodbye = b""
        self._poll = select.poll()
        self._poll.register(orders, select.POLLIN)
        self._alarm, alarming = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(alarming, warn_on_full_buffer=False)
        signal.signal(_PARENT_ENDS, _do_nothing)
        syscalls.die_with_parent(_PARENT_ENDS)
        self._poll.register(self._alarm, select.POLLIN)
        self._agent, self._agent_pid = -1, agent
        if os.getppid() == agent:  # else it is dead already, and so is the other end of the socket
            self._agent = os.pidfd_open(agent)
            self._poll.register(self._agent, select.POLLIN)

    def run(self) -> None:
        """Until the agent says so, or is dead and buried."""
        while True:
            ready = [fd for fd, _ in self._poll.poll()]
            if self._orders.fileno() in ready:
                try:
                    message, descriptors = receive(self._orders)
                except ConnectionResetError:  # it has closed without reading all; what it has sent is still to come
                    continue
                if message == END:
                    break
                if not message:
                    self._bury()
                    break
                self._obey(message[:1], message[1:], descriptors)
            elif self._agent in ready or (self._alarm in ready and self._agent_is_dying()):  # and has left no more orders
                self._bury()
                break
            for pid in [pid for pid, fd in self._children.items() if fd in ready]:
                self._poll.unregister(self._children[pid])
                self._tell(DIED + order.pack(pid))
        self._kill_helpers()
        self._reap_helpers()

    def _agent_is_dying(self) -> bool:
        """Rule 4. The signal comes a little before the zombie; it comes also when only the thread has ended."""
        os.read(self._alarm, _ALARMS_AT_ONCE)
        for _ in range(_ZOMBIE_LOOKS):
            if self._agent < 0 or _is_zombie(self._agent_pid):
                return True
            time.sleep(_ZOMBIE_LOOK_S)
        return False

    def _obey(self, kind: bytes, rest: bytes, descriptors: list[int]) -> None:
        if kind == FORK:
            self._fork(*order.unpack(rest))
        elif kind == REAP:
            (pid,) = order.unpack(rest)
            os.close(self._children.pop(pid))
            os.waitpid(pid, 0)
        elif kind == CHANNEL:
            if self._channel >= 0:
                os.close(self._channel)
            self._channel = descriptors.pop() if descriptors else -1
            self._goodbye = rest

    def _tell(self, message: bytes, *descriptors: int) -> None:
        try:
            send(self._orders, message, *descriptors)
        except OSError:
            return  # the agent is dead: the next turn finds out

    def _fork(self, slot: int) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine, theirs:
            try:
                pid = os.fork()
            except OSError as error:
                self._tell(FAILED + born.pack(error.errno or errno.EAGAIN, slot))
                return
            if pid == 0:
                _quietly(lambda: self._become_helper(mine, slot))
            self._children[pid] = os.pidfd_open(pid)
            self._poll.register(self._children[pid], select.POLLIN)
            self._tell(BORN + born.pack(pid, slot), theirs.fileno())

    def _become_helper(self, orders: socket.socket, slot: int) -> None:
        keeper = os.getppid()
        signal.set_wakeup_fd(-1)
        syscalls.die_with_parent(signal.SIGKILL)
        if os.getppid() != keeper:
            return  # it has died before
        mine = orders.fileno()
        os.closerange(0, mine)
        os.closerange(mine + 1, _highest_descriptor() + 1)
        Helper(self._mountpoint, self._connection, self._words, slot).serve(mine)

    def _bury(self) -> None:
        """The agent is dead: the kernel must not answer in its place, nor wait for it."""
        is_clean = self._clean_kernel()
        if self._channel >= 0:
            if is_clean:
                os.set_blocking(self._channel, False)
                _attempt(os.write, self._channel, self._goodbye)
            os.close(self._channel)  # without a goodbye, whoever could be answered wrongly is waited for as long as that may be
        self._kill_helpers()  # before requests end, lest they go on with their jobs
        os.close(self._device)  # the last descriptor: this ends the connection, and all requests with it

    def _clean_kernel(self) -> bool:
        """Attributes suffice: without those of its directories no name is found. False: something may still be answered from memory.

        The root first, without which nobody comes in by a path; then the youngest, since the oldest are mostly forgotten.
        """
        _attempt(os.write, self._device, _inc_epoch)  # names, too, where it is offered
        deadline_ns = time.monotonic_ns() + _CLEANING_NS
        is_clean = True
        for node in itertools.chain([ROOT_ID], range(self._words[HIGHEST_NODE], ROOT_ID, -1)):
            try:
                os.write(self._device, _inval_inode.pack(_inval_inode.size, Notify.INVAL_INODE, 0, node, -1, 0))
            except OSError as error:
                is_clean = is_clean and error.errno == errno.ENOENT  # nothing of this node is known
            if node % _NODES_AT_ONCE == 0 and time.monotonic_ns() > deadline_ns:
                return False
        return is_clean

    def _kill_helpers(self) -> None:
        for fd in self._children.values():
            _attempt(signal.pidfd_send_signal, fd, signal.SIGKILL)

    def _reap_helpers(self) -> None:
        """Those that do not hang; process 1 sees to the others."""
        for pid, fd in self._children.items():
            if _is_readable(fd, _REAP_TIMEOUT_MS):
                os.waitpid(pid, 0)


def _do_nothing(_number: int, _frame: object) -> None:
    """The wake-up descriptor says it."""


def _is_zombie(pid: int) -> bool:
    """Whether the first thread of the process has ended; nobody but us would have reaped the agent before its pidfd says so."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def _attempt(function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except OSError:
        return  # there is nobody whom it could be told, and the next step must be done all the same


def _is_readable(fd: int, timeout_ms: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_ms))


def _highest_descriptor() -> int:
    return max(int(name) for name in os.listdir("/proc/self/fd"))


def _quietly(function: Callable[[], None]) -> NoReturn:
    """Run it in a process that was forked, and end that."""
    code = 1
    try:
        function()
        code = 0
    finally:
        os._exit(code)


# ---- messages with descriptors, for both ends ----


def send(to: socket.socket, message: bytes, *descriptors: int) -> None:
    """One message, with copies of the descriptors."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    to.sendmsg([message], rights)


def receive(source: socket.socket) -> tuple[bytes, list[int]]:
    """One message, empty at the end, and the descriptors that came with it, which are the caller's now."""
    descriptors = array.array("i")
    message, ancillary, _, _ = source.recvmsg(MAX_ORDER_BYTES, socket.CMSG_LEN(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return message, list(descriptors)


def main() -> None:
    """The keeper's process. Arguments: descriptors of orders, device and page; the agent; the mount point; the connection."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    orders, device, page, agent = map(int, sys.argv[1:5])
    Keeper(orders, device, page, agent, os.fsencode(sys.argv[5]), int(sys.argv[6])).run()

"""Numbers and layouts of the FUSE kernel protocol 7.45.

Source: include/uapi/linux/fuse.h. Layouts are native-endian and padded to eight bytes, as on the only architecture that
the project supports (x86-64); ``tests/t0_abi/test_fuse_abi.py`` compares them with the installed kernel header.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

KERNEL_VERSION: Final = 7
KERNEL_MINOR_VERSION: Final = 45
OLDEST_MINOR_VERSION: Final = 31
ROOT_ID: Final = 1
MIN_READ_BUFFER_BYTES: Final = 8192


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


class Notify(IntEnum):
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    INC_EPOCH = 8


class InitFlag(IntFlag):
    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    HAS_EXPIRE_ONLY = 1 << 35


class SetattrValid:
    """Bits of ``fuse_setattr_in.valid``; plain integers, since those of ``IntFlag`` cost microseconds."""

    MODE: Final = 1 << 0
    UID: Final = 1 << 1
    GID: Final = 1 << 2
    SIZE: Final = 1 << 3
    ATIME: Final = 1 << 4
    MTIME: Final = 1 << 5
    FH: Final = 1 << 6
    ATIME_NOW: Final = 1 << 7
    MTIME_NOW: Final = 1 << 8
    LOCKOWNER: Final = 1 << 9
    CTIME: Final = 1 << 10
    KILL_SUIDGID: Final = 1 << 11


FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
GETATTR_FH: Final = 1 << 0
WRITE_CACHE: Final = 1 << 0
WRITE_KILL_SUIDGID: Final = 1 << 2
OPEN_KILL_SUIDGID: Final = 1 << 0
SETXATTR_ACL_KILL_SGID: Final = 1 << 0
FSYNC_FDATASYNC: Final = 1 << 0
LK_FLOCK: Final = 1 << 0
EXPIRE_ONLY: Final = 1 << 0

# Layouts, by the name of the kernel's struct.
in_header = Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
out_header = Struct("=IiQ")  # len error unique
attr = Struct("=QQQQQQIIIIIIIIII")  # ino size blocks a/m/ctime a/m/ctimensec mode nlink uid gid rdev blksize flags
entry_out = Struct("=QQQQII")  # nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec, then attr
attr_out = Struct("=QII")  # attr_valid attr_valid_nsec dummy, then attr
init_in = Struct("=IIII")  # major minor max_readahead flags: all there was before 7.36
init_in_ext = Struct("=IIIII44x")  # major minor max_readahead flags flags2
init_out = Struct(
    "=IIIIHHIIHHI28x"
)  # major minor readahead flags background congestion max_write gran pages align flags2
forget_in = Struct("=Q")
batch_forget_in = Struct("=II")
forget_one = Struct("=QQ")
getattr_in = Struct("=IIQ")  # getattr_flags dummy fh
statx_in = Struct("=IIQII")  # getattr_flags reserved fh sx_flags sx_mask
statx_out = Struct("=QII16x")  # attr_valid attr_valid_nsec flags spare[2], then 256 bytes of statx
setattr_in = Struct(
    "=IIQQQQQQIIIIIIII"
)  # valid pad fh size lock_owner a/m/ctime a/m/ctimensec mode unused uid gid unused
mknod_in = Struct("=IIII")  # mode rdev umask padding
mkdir_in = Struct("=II")  # mode umask
rename_in = Struct("=Q")  # newdir
rename2_in = Struct("=QII")  # newdir flags padding
link_in = Struct("=Q")  # oldnodeid
open_in = Struct("=II")  # flags open_flags
create_in = Struct("=IIII")  # flags mode umask open_flags
open_out = Struct("=QII")  # fh open_flags padding
release_in = Struct("=QIIQ")  # fh flags release_flags lock_owner
flush_in = Struct("=QIIQ")  # fh unused padding lock_owner
read_in = Struct("=QQIIQII")  # fh offset size read_flags lock_owner flags padding
write_in = Struct("=QQIIQII")  # fh offset size write_flags lock_owner flags padding
write_out = Struct("=II")  # size padding
statfs_out = Struct("=QQQQQIII28x")  # blocks bfree bavail files ffree bsize namelen frsize padding spare[6]
fsync_in = Struct("=QII")  # fh fsync_flags padding
setxattr_in = Struct("=IIII")  # size flags setxattr_flags padding
setxattr_in_compat = Struct("=II")  # size flags
getxattr_in = Struct("=II")  # size padding
getxattr_out = Struct("=II")  # size padding
lk_in = Struct("=QQQQIIII")  # fh owner, then the lock: start end (the last byte) type pid, then lk_flags padding
lk_out = Struct("=QQII")  # start end type pid
access_in = Struct("=II")  # mask padding
interrupt_in = Struct("=Q")  # unique
fallocate_in = Struct("=QQQII")  # fh offset length mode padding
lseek_in = Struct("=QQII")  # fh offset whence padding
lseek_out = Struct("=Q")  # offset
copy_file_range_in = Struct("=QQQQQQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
dirent = Struct("=QQII")  # ino off namelen type, then the name, padded to eight bytes
notify_inval_inode_out = Struct("=Qqq")  # nodeid off len
notify_inval_entry_out = Struct("=QII")  # parent namelen flags, then the name and a zero byte
linux_dirent64 = Struct("=QqHB")  # ino off reclen type, then the name, zero-terminated (getdents64(2))

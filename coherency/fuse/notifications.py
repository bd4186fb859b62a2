"""What a server tells its kernel without having been asked: to forget.

Source: fuse(4), Documentation/filesystems/fuse.rst of the kernel.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from coherency.fuse import abi, replies
from coherency.fuse.abi import InitFlag
from coherency.ids import NodeId

_NOTHING_TO_FORGET: Final = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)  # EINVAL: no such notification
_GONE: Final = (errno.ENODEV, errno.ECONNABORTED, errno.EBADF)

_ROOT: Final = replies.encode_inval_inode(NodeId(abi.ROOT_ID), -1, 0)
_FORGET_ROOT: Final = replies.reply_header(0, len(_ROOT), -abi.Notify.INVAL_INODE) + _ROOT


class Notifications:
    """The notifications of one connection; from any thread."""

    def __init__(self, device: int) -> None:
        self.init_flags = InitFlag(0)
        self.is_gone = False  # nothing is mounted any more, so the kernel knows nothing
        self._device = device

    def duplicate_device(self) -> int:
        """A descriptor of the connection, the caller's to close, for who must outlive this process."""
        return os.dup(self._device)

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool:
        """The kernel forgets the attributes of ``node``, from offset 0 on its pages too. False: it does not know the node.

        Attributes only (offset -1) never blocks; with pages it waits for I/O on them: only on a thread that answers requests
        if others are certain to be left.
        """
        return self._notify(abi.Notify.INVAL_INODE, replies.encode_inval_inode(node, offset, length))

    def invalidate_entry(self, parent: NodeId, name: bytes, *, expire_only: bool = False) -> bool:
        """The kernel forgets one name. Takes the parent's inode lock: never while a request that holds it is unanswered.

        ``expire_only``: it looks the name up again instead; false also if it does not offer that (HAS_EXPIRE_ONLY).
        """
        if expire_only and InitFlag.HAS_EXPIRE_ONLY not in self.init_flags:
            return False
        return self._notify(abi.Notify.INVAL_ENTRY, replies.encode_inval_entry(parent, name, expire_only=expire_only))

    def increment_epoch(self) -> bool:
        """The kernel looks every name up again. False: it is older than protocol 7.44 and cannot."""
        return self._notify(abi.Notify.INC_EPOCH, b"")

    def is_unknown(self) -> bool:
        """Whether the kernel does not know the root any more: it has ended the last mount. An aborted connection can still be mounted."""
        try:
            os.write(self._device, _FORGET_ROOT)
        except OSError as error:
            return error.errno == errno.ENOENT
        return False

    def _notify(self, code: abi.Notify, payload: bytes) -> bool:
        try:
            os.writev(self._device, [replies.reply_header(0, len(payload), -code), payload])
        except OSError as error:
            if error.errno in (*_NOTHING_TO_FORGET, *_GONE):
                return False
            raise
        return True

"""One file, served by the least that Python can do: one thread, one answer per opcode prepared beforehand.

No file system can be like this. It shows what a session costs, and below which time no Python program gets.
"""

from __future__ import annotations

import errno
import os
import sys

from coherency.fuse import abi, replies, syscalls
from coherency.fuse.abi import ROOT_ID, Opcode
from coherency.ids import HostInode, NodeId

FILE_ID = 2
MAX_WRITE_BYTES = 1 << 16


def main() -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions"
    syscalls.mount("bare_loop", sys.argv[1], "fuse.bare_loop", syscalls.MS_NODEV, options)
    root = replies.encode_attr(os.stat("/"), HostInode(ROOT_ID))
    file = replies.encode_attr(os.stat(__file__), HostInode(FILE_ID))
    init = replies.encode_init_out(31, 0, 0, max_write_bytes=MAX_WRITE_BYTES, max_pages=0, max_background=0)
    answers: dict[int, bytes] = {
        Opcode.INIT: init,
        Opcode.LOOKUP: replies.encode_entry(NodeId(FILE_ID), file),
        Opcode.OPEN: replies.encode_open(1),
        Opcode.FLUSH: b"",
        Opcode.RELEASE: b"",
    }
    attributes = {ROOT_ID: replies.encode_attr_out(root), FILE_ID: replies.encode_attr_out(file)}
    silent, getattr_code = (int(Opcode.FORGET), int(Opcode.INTERRUPT)), int(Opcode.GETATTR)
    buffer = bytearray(MAX_WRITE_BYTES + 4096)
    buffers, unpack_header = [buffer], abi.in_header.unpack_from
    while True:
        try:
            os.readv(device, buffers)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                return
            if error.errno not in (errno.ENOENT, errno.EINTR):
                raise
            continue
        _, opcode, unique, node, *_ = unpack_header(buffer)
        answer = attributes.get(node) if opcode == getattr_code else answers.get(opcode)
        if answer is not None:
            os.writev(device, (replies.reply_header(unique, len(answer)), answer))
        elif opcode not in silent:
            os.write(device, replies.reply_header(unique, 0, errno.ENOSYS))


if __name__ == "__main__":
    main()

"""The FUSE wire protocol, without libfuse.

``abi`` numbers and layouts, ``codec`` bytes to requests and replies to bytes (no I/O), ``session`` mounts and serves,
``nodes`` keeps what the kernel knows, ``passthrough`` the operations over a directory, ``syscalls`` what Python's
``os`` lacks. Source: include/uapi/linux/fuse.h, protocol 7.45. Why not libfuse: ``docs/decisions/0001-own-fuse-session.md``.
"""

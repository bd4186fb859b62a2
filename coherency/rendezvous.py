"""Where a daemon and its guests meet: the names in the runtime directory, and what may be a name of a daemon."""

from __future__ import annotations

import re
from typing import Final

from coherency.errors import UsageError

DEFAULT_RUNTIME_ROOT: Final = "/run/coherency"
RUNTIME_ROOT_VARIABLE: Final = "COHERENCY_RUNTIME_DIR"
CONTROL_SOCKET_NAME: Final = "control.sock"
TABLE_LINK_NAME: Final = "table"
EXPORT_DIRECTORY_NAME: Final = "export"
LOCK_FILE_NAME: Final = "lock"
SESSIONS_FILE_NAME: Final = "sessions"
WINDOW_DIRECTORY_NAME: Final = "vm"
VIRTIO_PORT_NAME: Final = "coherency.0"
"""In a virtual machine: the virtio-serial port that leads to the control socket, unless the operator says otherwise."""
_SHARE_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def check_share_name(name: str) -> str:
    """Return `name` if it may name a daemon's directory: 1 to 64 of ``A-Za-z0-9._-``, not starting with a dot.

    Raises `UsageError` otherwise.
    """
    if not _SHARE_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name: use 1 to 64 letters, digits, '.', '_' or '-', not starting with '.'")
    return name

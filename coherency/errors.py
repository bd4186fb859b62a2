"""Every exception that the package raises on its own account, sorted by who must act.

Errors of the operating system stay `OSError`: an errno belongs to the caller of the file system and is passed on.
"""


class CoherencyError(Exception):
    """Base of all errors below.  The command line prints it as one line, without a traceback, and exits with 1."""


# --- the operator must act ---------------------------------------------------------------------------------------


class UnsupportedPlatform(CoherencyError):
    """This machine cannot keep the table's promises (see `docs/spec/table.md`, memory ordering).

    Nothing to retry: the program must not start here.
    """


class UsageError(CoherencyError):
    """The operator gave options that are impossible or contradict each other.

    The catcher prints it and exits with 2.
    """


class AlreadyServing(CoherencyError):
    """Another daemon holds this name.  The operator stops that one or takes another name."""

    def __init__(self, name: str, pid: int | None) -> None:
        """`pid` is the holder's process id, None if it could not be learnt."""
        super().__init__(name, pid)
        self.name = name
        self.pid = pid

    def __str__(self) -> str:
        holder = "another daemon" if self.pid is None else f"process {self.pid}"
        return f"{holder} is already serving '{self.name}'"


class DaemonUnavailable(CoherencyError):
    """Nobody serves this name.

    The operator starts `coherency serve`; an agent that was connected tries again later.
    """

    def __init__(self, name: str, reason: str = "nobody is listening") -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"no daemon serves '{self.name}' ({self.reason}); start it with: coherency serve SHARE --name {self.name}"
        )


class LineUnavailable(DaemonUnavailable):
    """In a virtual machine: there is no serial line to the daemon, it is taken, or the host's end of it is closed.

    The operator looks at the options of QEMU; an agent that was connected tries again later.
    """

    def __str__(self) -> str:
        return f"no line to the daemon of '{self.name}': {self.reason}"


class MountError(CoherencyError):
    """A mount could not be made or removed.  The operator looks at the reason (rights, /dev/fuse, mount point)."""


class WatchError(CoherencyError):
    """Changes made directly in the share cannot be noticed here.

    The catcher goes on without, and tells the operator; or ends, if the operator had asked for it.
    """


# --- the table is not what it should be ---------------------------------------------------------------------------


class TableError(CoherencyError):
    """The memory is not a version table of an ABI we know, is damaged, can shrink, or belongs to somebody else.

    A guest that catches it uses no version from this memory: it asks the daemon for another table or goes without.
    A daemon that catches it while taking over a predecessor's table makes a new one.
    """


# --- the peer is at fault: drop that peer, and nobody else notices ------------------------------------------------


class PeerError(CoherencyError):
    """What came over the control channel breaks the protocol.  The catcher logs it and closes that one connection."""


class FrameError(PeerError):
    """The bytes are not a frame: wrong magic, too long, wrong checksum, or cut off."""


class MessageError(PeerError):
    """The frame is sound but its payload is no message: unknown type, wrong number, kind, length or range of fields."""


class ProtocolVersionError(PeerError):
    """The peer speaks another version of the control protocol.  The operator brings both sides to the same release."""


class Refused(CoherencyError):
    """The daemon understood the request and said no.

    Asking the same again does not help: the catcher shows `text` to the operator; programs look at `code`.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"the daemon refused: {self.text} (code {self.code})"


# --- the kernel (or we) broke the FUSE protocol -------------------------------------------------------------------


class FuseProtocolError(CoherencyError):
    """A request read from /dev/fuse is malformed.

    The session logs it, answers it with EINVAL if it has a header, and serves the next.
    """

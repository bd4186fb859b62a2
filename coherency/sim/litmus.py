"""Are two or more mounts of one tree coherent? A litmus test that asks only the file system itself.

In a private directory something is prepared through one mount and looked at through the others, so that they may cache it;
then it is changed, and looked at again at once. A look that does not show the change is *late*; it is repeated until
it does, or until a bound has passed: then it came *never*. Everything happens in one process, one call after the
other: a look begins after the change has returned, so a coherent file system has no excuse.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from coherency.errors import CoherencyError, UsageError
from coherency.fuse import syscalls

DEFAULT_BOUND_S: Final = 3.0
_SECOND_NS: Final = 1_000_000_000
_POLL_S: Final = 0.001
_XATTR: Final = "user.coherency-check"
_RENAME_EXCHANGE: Final = 2
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMLINK, errno.EINVAL})


class Trial(NamedTuple):
    """A kind of change. ``look`` returns ``before`` when ``prepare`` has been seen, and ``after`` when ``change`` has."""

    name: str
    prepare: Callable[[Path], object]
    change: Callable[[Path], object]
    look: Callable[[Path], Any]
    before: Any
    after: Any


def _write(name: str, size_bytes: int) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(b"x" * size_bytes)


def _append(place: Path) -> None:
    with open(place / "file", "ab") as file:
        file.write(b"12345")


def _retarget(place: Path) -> None:
    (place / "new").symlink_to("two")
    (place / "new").rename(place / "link")


def _replaceable(place: Path) -> None:
    _write("file", 10)(place)
    _write("other", 20)(place)


def _status(attribute: str) -> Callable[[Path], Any]:
    return lambda place: getattr(os.stat(place / "file"), attribute)


def _set_mtime(seconds: int) -> Callable[[Path], object]:
    return lambda place: os.utime(place / "file", (0, seconds))


def _dated(place: Path) -> None:
    _write("file", 1)(place)
    _set_mtime(1_000_000)(place)


def _set_xattr(value: bytes) -> Callable[[Path], object]:
    return lambda place: os.setxattr(place / "file", _XATTR, value)


def _marked(place: Path) -> None:
    _write("file", 1)(place)
    _set_xattr(b"one")(place)


def _xattrs(place: Path) -> list[str]:
    return [name for name in os.listxattr(place / "file") if name == _XATTR]


def _exchange(place: Path) -> None:
    syscalls.renameat2(
        syscalls.AT_FDCWD, os.fsencode(place / "other"), syscalls.AT_FDCWD, os.fsencode(place / "file"), _RENAME_EXCHANGE
    )  # fmt: skip


def _filled(place: Path) -> None:
    (place / "sub").mkdir()
    _write("sub/file", 1)(place)


def _private(place: Path) -> None:
    _write("file", 1)(place)
    (place / "file").chmod(0o600)


def _there(*names: str) -> Callable[[Path], tuple[bool, ...]]:
    return lambda place: tuple(os.path.lexists(place / name) for name in names)


def _names(place: Path) -> list[str]:
    return sorted(os.listdir(place))


TRIALS: Final = (
    Trial("create", lambda place: None, _write("file", 0), _there("file"), (False,), (True,)),
    Trial("unlink", _write("file", 1), lambda place: (place / "file").unlink(), _there("file"), (True,), (False,)),
    Trial("mkdir", lambda place: None, lambda place: (place / "sub").mkdir(), _there("sub"), (False,), (True,)),
    Trial("rmdir", lambda place: (place / "sub").mkdir(), lambda place: (place / "sub").rmdir(), _there("sub"), (True,), (False,)),
    Trial("rename", _write("file", 1), lambda place: (place / "file").rename(place / "new"), _there("file", "new"),
          (True, False), (False, True)),
    Trial("replace", _replaceable, lambda place: (place / "other").rename(place / "file"), _status("st_size"), 10, 20),
    Trial("link", _write("file", 1), lambda place: os.link(place / "file", place / "new"), _status("st_nlink"), 1, 2),
    Trial("symlink retarget", lambda place: (place / "link").symlink_to("one"), _retarget,
          lambda place: os.readlink(place / "link"), "one", "two"),
    Trial("chmod", _private, lambda place: (place / "file").chmod(0o640), lambda place: os.stat(place / "file").st_mode & 0o777,
          0o600, 0o640),
    Trial("truncate", _write("file", 10), lambda place: os.truncate(place / "file", 3), _status("st_size"), 10, 3),
    Trial("append", _write("file", 10), _append, _status("st_size"), 10, 15),
    Trial("mtime", _dated, _set_mtime(2_000_000), _status("st_mtime"), 1_000_000.0, 2_000_000.0),
    Trial("xattr", _marked, _set_xattr(b"two"), lambda place: os.getxattr(place / "file", _XATTR), b"one", b"two"),
    Trial("xattr removed", _marked, lambda place: os.removexattr(place / "file", _XATTR), _xattrs, [_XATTR], []),
    Trial("truncate by open", _write("file", 10), _write("file", 4), _status("st_size"), 10, 4),
    Trial("exchange", _replaceable, _exchange, _status("st_size"), 10, 20),
    Trial("move directory", _filled, lambda place: (place / "sub").rename(place / "moved"), _there("sub/file", "moved/file"),
          (True, False), (False, True)),
    Trial("listing grows", _write("file", 1), _write("new", 1), _names, ["file"], ["file", "new"]),
    Trial("listing shrinks", _write("file", 1), lambda place: (place / "file").unlink(), _names, ["file"], []),
)  # fmt: skip


@dataclass
class Tally:
    """What came of one kind of change."""

    looks: int = 0
    never: int = 0  # also counted as late
    late_ns: list[int] = field(default_factory=list)  # of those that came in the end
    unsupported: str = ""

    @property
    def late(self) -> int:
        return len(self.late_ns) + self.never

    def quantile_ns(self, part: float) -> int:
        """Of the late ones that came in the end; 0 if there are none."""
        ordered = sorted(self.late_ns)
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0


class _Pending(NamedTuple):
    trial: Trial
    place: Path
    changed_ns: int


class Litmus:
    """``run`` once; ``tallies`` has the result, by name of the trial, also while it runs."""

    def __init__(self, directories: Sequence[Path], *, bound_s: float = DEFAULT_BOUND_S) -> None:
        """``bound_s``: after this time a look has come never. Raises :class:`UsageError` if there is nothing to compare."""
        if len(directories) < 2:
            raise UsageError("one directory has nothing to be compared with: give two or more")
        real = [os.path.realpath(directory) for directory in directories]
        for path in real:
            if real.count(path) > 1:
                raise UsageError(f"{path} is given twice; different mounts of one tree are compared")
        self._directories = list(directories)
        self._bound_ns = round(bound_s * _SECOND_NS)
        self._base = f".coherency-check-{secrets.token_hex(6)}"
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.rounds = 0

    def run(self, seconds: float, tell: Callable[[str], None]) -> None:
        """At least one round through each mount, and more until ``seconds`` are over. Removes what it makes.

        Raises :class:`UsageError` if the directories do not show the same tree.
        """
        first = self._directories[0] / self._base
        first.mkdir()
        try:
            self._require_same_tree()
            until_ns = time.monotonic_ns() + round(seconds * _SECOND_NS)
            while self.rounds < len(self._directories) or time.monotonic_ns() < until_ns:
                writer = self._directories[self.rounds % len(self._directories)]
                tell(f"round {self.rounds + 1}: changes through {writer}")
                self._round(writer)
                self.rounds += 1
        finally:
            shutil.rmtree(first, ignore_errors=True)
            if first.exists():
                raise CoherencyError(f"could not remove {first}")

    def _require_same_tree(self) -> None:
        name = Path(self._base) / "nonce"
        nonce = secrets.token_bytes(16)
        (self._directories[0] / name).write_bytes(nonce)
        for directory in self._directories[1:]:
            if not self._comes(lambda place=directory / name: place.read_bytes(), nonce):  # type: ignore[misc]
                raise UsageError(
                    f"{directory} does not show what is made in {self._directories[0]}: they are not the same tree"
                )
        (self._directories[0] / name).unlink()

    def _round(self, writer: Path) -> None:
        place = writer / self._base / str(self.rounds)
        place.mkdir()
        pending: list[_Pending] = []
        try:
            for number, trial in enumerate(TRIALS):
                if not self.tallies[trial.name].unsupported:
                    self._try(trial, writer, f"{self._base}/{self.rounds}/{number}", pending)
                self._poll(pending)
            while pending:
                time.sleep(_POLL_S)
                self._poll(pending)
        finally:
            # By whom all of this was made, so that no stale listing hides a part of it.
            shutil.rmtree(place, ignore_errors=True)

    def _try(self, trial: Trial, writer: Path, path: str, pending: list[_Pending]) -> None:
        tally = self.tallies[trial.name]
        watchers = [directory / path for directory in self._directories if directory != writer]
        (writer / path).mkdir()
        try:
            trial.prepare(writer / path)
            ready = [place for place in watchers if self._comes(lambda place=place: trial.look(place), trial.before)]  # type: ignore[misc]
            tally.looks += len(watchers) - len(ready)
            tally.never += len(watchers) - len(ready)
            trial.change(writer / path)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            tally.unsupported = error.strerror or str(error)
            return
        changed_ns = time.monotonic_ns()
        for place in ready:
            tally.looks += 1
            if _look(trial, place) != trial.after:
                pending.append(_Pending(trial, place, changed_ns))

    def _poll(self, pending: list[_Pending]) -> None:
        for each in list(pending):
            looked_ns = time.monotonic_ns()
            tally = self.tallies[each.trial.name]
            if _look(each.trial, each.place) == each.trial.after:
                tally.late_ns.append(looked_ns - each.changed_ns)
            elif looked_ns - each.changed_ns > self._bound_ns:
                tally.never += 1
            else:
                continue
            pending.remove(each)

    def _comes(self, look: Callable[[], Any], expected: Any) -> bool:
        """Whether it shows within the bound."""
        until_ns = time.monotonic_ns() + self._bound_ns
        while True:
            try:
                if look() == expected:
                    return True
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    raise
            if time.monotonic_ns() > until_ns:
                return False
            time.sleep(_POLL_S)


def _look(trial: Trial, place: Path) -> Any:
    try:
        return trial.look(place)
    except OSError as error:  # whatever it is, it does not show the change
        return error

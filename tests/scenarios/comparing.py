"""The same scenario in two directories: what it returns and what it leaves behind must be the same in both.

What a scenario returns is a list of whatever it has seen, in order; a call that fails stands there with its errno.
"""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from tests.snapshots import Facts, differences, snapshot, timeless

_YEAR_2000_NS = 946_684_800 * 10**9

Scenario: TypeAlias = Callable[[Path], Any]
"""Works in the directory that it is given; what it returns is compared."""


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the call returns, or the name of its errno."""
    try:
        return function(*arguments, **options)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def compare(scenario: Scenario, plain: Path, mounted: Path, share: Path, *, writeback: bool = False) -> None:
    """Run the scenario in a new directory of ``plain``, and in one of ``share`` through ``mounted``."""
    name = scenario.__name__
    expected = _run(scenario, plain / name)
    got = _run(scenario, mounted / name)
    assert got == expected, f"mounted {got!r}\n  plain {expected!r}"
    through, below = snapshot(mounted / name), snapshot(share / name)
    # With a write-back cache the kernel has times of its own, and writes some of them back, some time.
    lines = differences(_without_times(through), _without_times(below)) if writeback else differences(through, below)
    assert not lines, "the mount shows something else than the directory:\n" + "\n".join(lines)
    lines = differences(_comparable(through), _comparable(snapshot(plain / name)))
    assert not lines, "mounted != plain:\n" + "\n".join(lines)


def _run(scenario: Scenario, directory: Path) -> Any:
    directory.mkdir()
    directory.chmod(0o777)
    return scenario(directory)


def _without_times(tree: dict[bytes, Facts]) -> dict[bytes, Facts]:
    return {path: each._replace(mtime_ns=0, ctime_ns=0) for path, each in tree.items()}


def _comparable(tree: dict[bytes, Facts]) -> dict[bytes, Facts]:
    """Times of the last century have been set by the scenario, and are compared; others are of the moment."""
    return {
        path: without._replace(mtime_ns=tree[path].mtime_ns if tree[path].mtime_ns < _YEAR_2000_NS else 0)
        for path, without in timeless(tree).items()
    }


class UserProcess:
    """A child process that runs a function as some user, in a directory.

    The directory becomes the working directory before the user does, who may have no way to it.
    """

    def __init__(
        self,
        directory: Path,
        function: Callable[[], Any],
        *,
        uid: int = 1001,
        gid: int = 1002,
        groups: Iterable[int] = (),
        umask: int = 0o22,
    ) -> None:
        reading, writing = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                os.chdir(directory)
                os.umask(umask)
                os.setgroups(list(groups))
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
                os.write(writing, pickle.dumps(attempt(function)))
            finally:
                os._exit(0)
        os.close(writing)
        self._pipe = reading

    def result(self) -> Any:
        """What the function has returned, or the name of its errno."""
        with open(self._pipe, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(self._child, 0)
        assert answer, "the child failed otherwise than by an OSError"
        return pickle.loads(answer)


def as_user(directory: Path, function: Callable[[], Any], **identity: Any) -> Any:
    """The result of the function, run by a :class:`UserProcess`."""
    return UserProcess(directory, function, **identity).result()

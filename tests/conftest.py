"""What holds for every test: order by level, no undeclared warning, no mount left behind, no silent skip.

1. Tests run in the order of their levels, t0 first; a test file in no level is refused.
2. A warning or error which the package logs in the test process fails the test, unless the test declares it with
   `@pytest.mark.expected_logs(r"regular expression", ...)`.
3. When the session ends, no mount of ours may lie in its temporary directories. One that does fails the session and
   is unmounted.
4. A test that needs what this machine lacks is skipped with the reason, which the summary shows.
5. No test leaves the ids, the umask or the securebits of another user to the next.
"""

import ctypes
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from coherency.fuse import syscalls
from tests import mounts, workers
from tests.vm.parts import why_no_vm

TESTS = Path(__file__).resolve().parent

# A time limit per example would fail on a busy machine, and say nothing about the code.
# The same examples each time: a suite that fails tells of the change. New examples: HYPOTHESIS_PROFILE=explore.
hypothesis.settings.register_profile("coherency", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "coherency"))


# --- 1 and 4: levels, and what a level needs ----------------------------------------------------------------------


def why_no_fuse() -> str | None:
    """Why no FUSE mount can be made here; None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"needs /dev/fuse: {error}"
    return None


NEEDS: dict[str, Callable[[], str | None]] = {"needs_fuse": why_no_fuse, "needs_vm": why_no_vm}
NEEDS_OF_LEVEL = {"t4": ["needs_fuse"], "t5": ["needs_fuse", "needs_vm"]}


def level_of(path: Path) -> str:
    """The level of a test file, `t0` to `t5`, by the directory below tests/ that it lies in."""
    directory = path.relative_to(TESTS).parts[0]
    match = re.match(r"(t[0-5])_", directory)
    if match is None:
        raise pytest.UsageError(f"{path} lies in no level: see tests/README.md")
    return match[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = level_of(item.path)
        item.add_marker(level)
        for need in NEEDS_OF_LEVEL.get(level, ()):
            item.add_marker(need)
    items.sort(key=lambda item: level_of(item.path))

    for need, why_not in NEEDS.items():
        needy = [item for item in items if item.get_closest_marker(need)]
        if needy and (reason := why_not()):
            for item in needy:
                item.add_marker(pytest.mark.skip(reason=reason))


# --- 2: logs ------------------------------------------------------------------------------------------------------


class LogGuard(logging.Handler):
    """Keeps what the package logs at WARNING and above, from any thread, until it is asked for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def take(self) -> list[logging.LogRecord]:
        """The records since the last call."""
        records, self._records = self._records, []
        return records


# --- 3: mounts ----------------------------------------------------------------------------------------------------


class MountGuard:
    """Knows the temporary directories of this session, and after which test a mount in them was first seen."""

    def __init__(self) -> None:
        # Not below the usual place: the path of a Unix socket has to fit into 107 bytes.
        self.short_root = Path(tempfile.mkdtemp(prefix="coh-", dir="/tmp")).resolve()
        self.roots = [self.short_root]
        self.left_behind: list[str] = []
        self._first_seen: dict[Path, str] = {}

    def note(self, nodeid: str) -> None:
        """Remembers the mounts that are there after a test."""
        present = [mount.mountpoint for mount in mounts.coherency_mounts_below(self.roots)]
        self._first_seen = {mountpoint: self._first_seen.get(mountpoint, nodeid) for mountpoint in present}

    def unmount_all(self) -> None:
        """Unmounts what is in the directories, the newest first, and fills `left_behind`."""
        for mount in reversed(mounts.coherency_mounts_below(self.roots)):
            seen = self._first_seen.get(mount.mountpoint, "no test")
            self.left_behind.append(f"{mount.mountpoint} ({mount.type}), first seen after {seen}")
            mounts.detach(mount.mountpoint)

    def close(self) -> None:
        """Removes the short directories."""
        shutil.rmtree(self.short_root)


_LEFT_BEHIND = "mounts left behind"
log_guard_key = pytest.StashKey[LogGuard]()
mount_guard_key = pytest.StashKey[MountGuard]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if workers.is_worker(session.config):
        workers.have_own_mounts()
    given = session.config.getoption("basetemp")
    if given is not None:
        # pytest is about to delete this directory with all that lies in it: not through a mount.
        old = mounts.coherency_mounts_below([Path(given).resolve()])
        for mount in reversed(old):
            mounts.detach(mount.mountpoint)
        if old:
            names = ", ".join(str(mount.mountpoint) for mount in old)
            pytest.exit(f"--basetemp had mounts of an earlier session in it, now unmounted: {names}", returncode=1)

    session.config.stash[mount_guard_key] = MountGuard()
    session.config.stash[log_guard_key] = log_guard = LogGuard()
    logging.getLogger("coherency").addHandler(log_guard)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    log_guard = item.config.stash[log_guard_key]
    try:
        result = yield
    except BaseException:
        # Failed already: what was logged is in the report, and must not be held against the next test.
        log_guard.take()
        raise
    finally:
        item.config.stash[mount_guard_key].note(item.nodeid)

    expected = [pattern for marker in item.iter_markers("expected_logs") for pattern in marker.args]
    undeclared = [
        f"{record.levelname} {record.name}: {record.getMessage()}"
        for record in log_guard.take()
        if not any(re.search(pattern, record.getMessage()) for pattern in expected)
    ]
    if undeclared:
        pytest.fail("logged, but not declared with expected_logs:\n" + "\n".join(undeclared), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None]:
    mount_guard = session.config.stash.get(mount_guard_key, None)
    if mount_guard is None:
        return (yield)
    # Before pytest looks through the temporary directories: at a mount whose server is stopped it would wait for ever.
    # After an interruption, though, the fixtures are torn down only by the other implementations of this hook.
    if exitstatus != pytest.ExitCode.INTERRUPTED:
        mount_guard.unmount_all()
    yield
    mount_guard.unmount_all()
    mount_guard.close()
    if mount_guard.left_behind:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if workers.is_worker(session.config):
        session.config.workeroutput[_LEFT_BEHIND] = mount_guard.left_behind  # type: ignore[attr-defined]
    logging.getLogger("coherency").removeHandler(session.config.stash[log_guard_key])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Of pytest-xdist: a worker has ended."""
    if error is None:
        node.config.stash[mount_guard_key].left_behind.extend(node.workeroutput[_LEFT_BEHIND])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    mount_guard = config.stash.get(mount_guard_key, None)
    if mount_guard is not None and mount_guard.left_behind:
        terminalreporter.section("mounts left behind", red=True)
        for line in mount_guard.left_behind:
            terminalreporter.line(line, red=True)


@pytest.fixture(scope="session", autouse=True)
def mount_guard_knows_basetemp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    request.config.stash[mount_guard_key].roots.append(tmp_path_factory.getbasetemp().resolve())


# --- 5: who the test process is -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_ids() -> Generator[None, None, None]:
    """A test that calls an operation itself takes on the caller's ids and umask: its thread is the one that serves.

    Programs started by later tests would inherit them, and the securebits that let a thread keep its capabilities.
    """
    umask = os.umask(0o022)
    os.umask(umask)
    securebits = _prctl(_PR_GET_SECUREBITS, 0)
    yield
    os.umask(umask)
    syscalls.set_fs_ids(*_OWN_IDS)
    if _prctl(_PR_GET_SECUREBITS, 0) != securebits:
        assert _prctl(_PR_SET_SECUREBITS, securebits) == 0


_OWN_IDS = os.geteuid(), os.getegid()  # asked before any test pretends to be somebody else
_PR_GET_SECUREBITS, _PR_SET_SECUREBITS = 27, 28


def _prctl(option: int, value: int) -> int:
    result: int = ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)
    return result


# --- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_socket_dir(request: pytest.FixtureRequest) -> Callable[[], Path]:
    """Makes new empty directories with paths short enough for Unix sockets; they go when the session ends."""
    root = request.config.stash[mount_guard_key].short_root
    numbers = count()

    def make() -> Path:
        directory = root / str(next(numbers))
        directory.mkdir()
        return directory

    return make


@pytest.fixture
def socket_dir(make_socket_dir: Callable[[], Path]) -> Path:
    """A new empty directory with a path short enough for Unix sockets: a good place for a runtime directory."""
    return make_socket_dir()

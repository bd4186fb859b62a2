"""The guards of conftest.py, tried in test sessions of their own: each must be seen to fail what it forbids."""

import logging
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(conftest.__file__).parents[1]


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory of tests with this project's settings and conftest.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (pytester.path / "setup.cfg").write_text((ROOT / "setup.cfg").read_text())
    pytester.makeconftest(Path(conftest.__file__).read_text())
    return pytester


def write(inner: pytest.Pytester, path: str, text: str) -> None:
    file = inner.path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def run(inner: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return inner.runpytest_subprocess("-v", ".", *arguments, timeout=60)


def test_undeclared_log_fails_the_test_that_caused_it(inner: pytest.Pytester) -> None:
    write(
        inner,
        "t1_core/test_a.py",
        """
import logging, threading, pytest

def log(level):
    thread = threading.Thread(target=logging.getLogger("coherency.daemon").log, args=(level, "dropped peer %d", 7))
    thread.start()
    thread.join()

def test_info():
    log(logging.INFO)

def test_warning():
    log(logging.WARNING)

def test_error():
    log(logging.ERROR)

@pytest.mark.expected_logs("another")
def test_other_expected():
    log(logging.WARNING)

@pytest.mark.expected_logs(r"^dropped peer \\d$")
def test_expected():
    log(logging.WARNING)

@pytest.mark.expected_logs("another", "peer 7")
def test_one_of_two_expected():
    log(logging.ERROR)

def test_other_logger():
    logging.getLogger("elsewhere").error("dropped peer 7")
""",
    )
    result = run(inner)
    result.assert_outcomes(passed=7, errors=3)
    result.stdout.fnmatch_lines(["WARNING coherency.daemon: dropped peer 7"])
    failed = [line.split()[1] for line in result.outlines if line.startswith("ERROR t1_core")]
    assert failed == [f"t1_core/test_a.py::test_{name}" for name in ("warning", "error", "other_expected")]


def test_log_of_a_failed_test_is_not_held_against_the_next(inner: pytest.Pytester) -> None:
    write(
        inner,
        "t1_core/test_a.py",
        """
import logging, pytest
@pytest.fixture
def broken():
    yield
    logging.getLogger("coherency").error("in between")
    raise OSError
def test_broken(broken): pass
def test_next(): pass
""",
    )
    run(inner).assert_outcomes(passed=2, errors=1)


def test_the_guard_of_this_session_is_in_place(request: pytest.FixtureRequest) -> None:
    guard = request.config.stash[conftest.log_guard_key]
    logging.getLogger("coherency.some.module").warning("taken %s", "away")
    assert [record.getMessage() for record in guard.take()] == ["taken away"]


def test_levels_run_in_order_and_can_be_chosen(inner: pytest.Pytester) -> None:
    for directory in ("t3_process", "t0_abi", "t1_core"):
        write(inner, f"{directory}/test_same_name.py", "def test_a(): pass")
    order = [line.split("::")[0] for line in run(inner).outlines if line.endswith("%]")]
    assert order == ["t0_abi/test_same_name.py", "t1_core/test_same_name.py", "t3_process/test_same_name.py"]
    run(inner, "-m", "t0 or t1").assert_outcomes(passed=2, deselected=1)


def test_file_in_no_level_is_refused(inner: pytest.Pytester) -> None:
    write(inner, "elsewhere/test_a.py", "def test_a(): pass")
    result = run(inner)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*elsewhere/test_a.py lies in no level*"])


NEEDY_TEST = "import pytest\n@pytest.mark.needs_fuse\ndef test_a(): pass\ndef test_b(): pass"


def test_a_skip_for_want_of_fuse_shows_its_reason(inner: pytest.Pytester) -> None:
    write(inner, "t3_process/test_a.py", NEEDY_TEST)
    write(inner, "t4_fuse/test_c.py", "def test_c(): pass")
    with (inner.path / "conftest.py").open("a") as file:
        file.write("\nos.geteuid = lambda: 1000\n")
    result = run(inner)
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED*needs root"])


def test_leftover_warning_is_an_error(inner: pytest.Pytester) -> None:
    write(inner, "t1_core/test_a.py", "import socket\ndef test_a(): socket.socketpair()")
    result = run(inner)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*ResourceWarning*"])


def test_socket_dirs_are_short_new_and_gone_afterwards(inner: pytest.Pytester) -> None:
    write(
        inner,
        "t3_process/test_a.py",
        """
def test_a(socket_dir, make_socket_dir):
    other = make_socket_dir()
    assert socket_dir != other
    for directory in (socket_dir, other):
        assert len(str(directory)) <= 24 and not list(directory.iterdir())
    print("in", socket_dir.parent)
""",
    )
    result = run(inner, "-s")
    result.assert_outcomes(passed=1)
    (root,) = [line.split()[-1] for line in result.outlines if "in /tmp/coh-" in line]
    assert not Path(root).exists()

"""From calls to registers to a verdict, with hand-made calls; and the choice of calls and faults."""

import errno
import stat
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from random import Random
from typing import Any

import pytest

from coherency.errors import UsageError
from coherency.guest_agent.mount import MODES
from coherency.sim.calls import (
    ANSWERS,
    ATTRIBUTE_FILES,
    ATTRIBUTE_OF,
    CREATES,
    INITIAL_MODE,
    LOOKS,
    REMOVES,
    RENAMES,
    Names,
    Step,
    after,
    changed_attribute,
    made_by,
    names_of,
)
from coherency.sim.faults import FAULTS, fault_sequence, parse_faults
from coherency.sim.history import (
    LOST,
    NAME,
    Call,
    Register,
    accesses,
    attribute_value,
    initial_values,
    mtime_ns,
)
from coherency.sim.names import (
    MISSING,
    NO_LINK,
    NOWHERE,
    PRESENT,
    SOMEWHERE,
    UNKNOWN,
    Entry,
    agrees,
    entry_look,
    followed_look,
    target_look,
)
from coherency.sim.verdict import AUTO_TIMEOUT_NS, PROMISES, Promise, Verdict, Window, describe, judge
from coherency.sim.workload import Workload

INITIAL = initial_values({path: 100 + number for number, path in enumerate(ATTRIBUTE_FILES)})
SIZED, DATED = "a/size0", "a/mtime0"
FILE = Entry(stat.S_IFREG | 0o640, 7)
LINK = Entry(stat.S_IFLNK | 0o777, 8, "elsewhere")
MS = 1_000_000


def call(at: int, op: str, path: str, other: str = "", number: int = 0, *, guest: int = 0, **rest: Any) -> Call:
    """A call from ``at`` ms on that takes one ms."""
    rest = {"error": 0, **rest}
    return Call(guest, guest, at * MS, (at + 1) * MS, Step(op, path, other, number), **rest)


def stat_result(path: str, *, mode: int = INITIAL_MODE, uid: int = 0, size: int = 0, mtime: int = mtime_ns(0)) -> list[int]:
    return [100 + ATTRIBUTE_FILES.index(path), stat.S_IFREG | mode, uid, size, mtime]


def verdict(calls: Sequence[Call], promise: Promise = Promise.LINEARIZABLE, windows: Sequence[Window] = ()) -> Verdict:
    return judge(calls, INITIAL, windows, promise)


def seen(calls: Sequence[Call], what: str, path: str) -> list[Any]:
    return [read.seen for read in accesses(calls, INITIAL)[Register(what, path)].reads]


def written(calls: Sequence[Call], what: str, path: str) -> list[Any]:
    return [write.value for write in accesses(calls, INITIAL)[Register(what, path)].writes]


# --- names and what is told of them ---


@pytest.mark.parametrize(
    ("look", "nothing", "file", "link"),
    [
        (MISSING, True, False, False),
        (PRESENT, False, True, True),
        (NOWHERE, True, False, True),
        (SOMEWHERE, False, True, False),
        (NO_LINK, False, True, False),
        (entry_look(7, FILE.mode), False, True, False),
        (entry_look(7, None), False, True, False),
        (entry_look(7, stat.S_IFREG | 0o600), False, False, False),
        (entry_look(9, FILE.mode), False, False, False),
        (entry_look(8, LINK.mode), False, False, True),
        (followed_look(7, FILE.mode), False, True, False),
        (followed_look(8, LINK.mode), False, False, False),
        (target_look("elsewhere"), False, False, True),
        (target_look("nowhere"), False, False, False),
    ],
)
def test_what_each_look_agrees_with(look: Any, nothing: bool, file: bool, link: bool) -> None:
    assert (agrees(look, None), agrees(look, FILE), agrees(look, LINK)) == (nothing, file, link)


def test_inode_that_nobody_learnt_agrees_with_any() -> None:
    assert agrees(entry_look(12345, FILE.mode), FILE._replace(ino=None))
    assert not agrees(entry_look(12345, LINK.mode), FILE._replace(ino=None))


# --- calls to registers ---


def test_stat_reads_the_name_and_each_attribute() -> None:
    calls = [call(0, "stat", SIZED, result=stat_result(SIZED, size=5, mode=0o600, uid=3))]
    assert seen(calls, "size", SIZED) == [5]
    assert seen(calls, "mode", SIZED) == [0o600]
    assert seen(calls, "uid", SIZED) == [3]
    assert seen(calls, NAME, SIZED) == [followed_look(100, None)]
    assert Register("mtime", SIZED) not in accesses(calls, INITIAL)


def test_changes_write_what_looks_return() -> None:
    for op, what in ATTRIBUTE_OF.items():
        path = DATED if op == "utime" else SIZED
        step = Step(op, path, "", 5)
        assert written([call(0, op, path, number=5)], what, path)[-1] == attribute_value(step)
    assert seen([call(0, "getxattr", SIZED, result="5")], "xattr", SIZED) == [attribute_value(Step("setxattr", SIZED, "", 5))]


def test_rename_writes_both_names() -> None:
    plain = [call(0, "rename", "d0/x", "d1/y", source=FILE, target=LINK)]
    assert written(plain, NAME, "d0/x") == [None, None]
    assert written(plain, NAME, "d1/y") == [None, FILE]
    exchanged = [call(0, "rename-exchange", "d0/x", "d1/y", source=FILE, target=LINK)]
    assert written(exchanged, NAME, "d0/x") == [None, LINK]
    assert written(exchanged, NAME, "d1/y") == [None, FILE]
    assert seen(exchanged, NAME, "d0/x") == seen(exchanged, NAME, "d1/y") == [PRESENT]
    careful = [call(0, "rename-noreplace", "d0/x", "d1/y", source=FILE)]
    assert seen(careful, NAME, "d1/y") == [MISSING]


def test_refusals_are_looks() -> None:
    assert seen([call(0, "create", "d0/x", error=errno.EEXIST, source=FILE)], NAME, "d0/x") == [PRESENT]
    assert seen([call(0, "link", "d0/x", "d1/y", error=errno.EEXIST, source=FILE)], NAME, "d1/y") == [PRESENT]
    assert seen([call(0, "unlink", "d0/x", error=errno.ENOENT)], NAME, "d0/x") == [MISSING]
    assert seen([call(0, "readlink", "d0/x", error=errno.EINVAL)], NAME, "d0/x") == [NO_LINK]
    assert seen([call(0, "stat", "d0/x", error=errno.ENOENT)], NAME, "d0/x") == [NOWHERE]
    assert seen([call(0, "lstat", "d0/x", error=errno.ENOENT)], NAME, "d0/x") == [MISSING]
    assert seen([call(0, "chmod", SIZED, error=errno.ENOENT)], NAME, SIZED) == [MISSING]


def test_disturbed_change_may_have_happened_and_disturbed_look_saw_nothing() -> None:
    calls = [
        call(0, "truncate", SIZED, number=5, error=errno.EIO),
        call(2, "stat", SIZED, error=errno.ENOTCONN),
        call(4, "create", "d0/x", number=0o640, error=errno.EIO, made=FILE._replace(ino=None)),
    ]
    found = accesses(calls, INITIAL)
    assert not found[Register("size", SIZED)].writes[-1].certain
    assert not found[Register(NAME, "d0/x")].writes[-1].certain
    assert Register("mode", SIZED) in found
    assert found[Register("mode", SIZED)].reads == []
    assert found[Register(NAME, "d0/x")].reads == []


def test_link_to_what_the_kernel_believed_in_is_anything() -> None:
    calls = [call(0, "link", "d0/x", "d1/y", error=LOST, source=FILE), call(5, "lstat", "d1/y", result=[99, 0o100600, 0, 0, 0])]
    assert written(calls, NAME, "d1/y") == [None, UNKNOWN]
    assert verdict(calls, Promise.BOUNDED).violations == ()
    assert agrees(PRESENT, UNKNOWN)
    assert not agrees(MISSING, UNKNOWN)


def test_listing_looks_at_every_name_of_its_directory() -> None:
    calls = [
        call(0, "create", "d0/x", made=FILE),
        call(2, "create", "d0/y", made=FILE),
        call(4, "listdir", "d0", result=["x"]),
    ]
    assert seen(calls, NAME, "d0/x")[-1] == PRESENT
    assert seen(calls, NAME, "d0/y")[-1] == MISSING
    assert [violation.where for violation in verdict(calls).violations] == ["d0/y"]


# --- verdicts ---


def test_every_mode_has_a_promise() -> None:
    assert set(PROMISES) == set(MODES)


def test_stale_attribute_is_found_with_the_calls_that_show_it() -> None:
    calls = [
        call(0, "stat", SIZED, result=stat_result(SIZED)),
        call(10, "truncate", SIZED, number=5),
        call(12, "stat", DATED, result=stat_result(DATED), guest=1),
        call(20, "stat", SIZED, result=stat_result(SIZED, size=0), guest=1),
        call(30, "stat", SIZED, result=stat_result(SIZED, size=5), guest=1),
    ]
    found = verdict(calls)
    assert [(each.where, each.calls) for each in found.violations] == [("size of a/size0", (calls[1], calls[3]))]
    assert (found.staleness.stale, found.staleness.max_ns) == (1, 9 * MS)
    assert "truncate a/size0 5" in describe(calls[1], 0)


def test_stale_name_is_found() -> None:
    calls = [
        call(0, "create", "d0/x", made=FILE),
        call(10, "unlink", "d0/x", source=FILE),
        call(20, "exists", "d0/x", result=True, guest=1),
    ]
    assert [violation.calls for violation in verdict(calls).violations] == [tuple(calls)]
    assert verdict(calls, Promise.NOTHING).violations == ()
    assert verdict(calls, Promise.NOTHING).staleness.stale == 1


def test_inode_number_used_again_with_old_attributes_is_found() -> None:
    calls = [
        call(0, "create", "d0/x", made=FILE),
        call(10, "unlink", "d0/x", source=FILE),
        call(20, "create", "d0/x", made=FILE._replace(mode=stat.S_IFREG | 0o600)),
        call(30, "lstat", "d0/x", result=[FILE.ino, FILE.mode, 0, 0, 0], guest=1),
    ]
    assert len(verdict(calls).violations) == 1


def test_errors_need_a_fault_of_that_time_and_guest() -> None:
    broken = [call(10, "stat", SIZED, error=errno.ENOTCONN, guest=1)]
    assert len(verdict(broken).violations) == 1
    assert verdict(broken, windows=[Window("x", 5 * MS, 10 * MS, (1,))]).violations == ()
    assert verdict(broken, windows=[Window("x", 5 * MS, 10 * MS, (0, 1))]).violations == ()
    for window in (Window("x", 5 * MS, 10 * MS, (0,)), Window("x", 5 * MS, 9 * MS, (1,)), Window("x", 5 * MS, 10 * MS, ())):
        assert len(verdict(broken, windows=[window]).violations) == 1
    lost = [call(10, "unlink", "d0/x", error=LOST, source=FILE)]
    assert len(verdict(lost, windows=[Window("x", 0, 100 * MS, (0,))]).violations) == 1


def test_auto_may_be_stale_for_its_timeout() -> None:
    timeout_ms = AUTO_TIMEOUT_NS // MS

    def at(stale_ms: int) -> Verdict:
        look = call(11 + stale_ms, "stat", SIZED, result=stat_result(SIZED, size=0), guest=1)
        return verdict([call(10, "truncate", SIZED, number=5), look], Promise.BOUNDED)

    assert at(timeout_ms - 1).violations == ()
    assert at(timeout_ms - 1).staleness.stale == 1
    assert [len(violation.calls) for violation in at(timeout_ms + 20).violations] == [2]
    never = [call(10, "stat", SIZED, result=stat_result(SIZED, size=77))]
    assert len(verdict(never, Promise.BOUNDED).violations) == 1


def test_auto_moves_what_it_believes_in() -> None:
    """A rename under a stale name shows, to that guest and for so long, what never was there."""
    rename = call(0, "rename", "d0/x", "d1/y", source=FILE, guest=1)

    def seen_at(at: int, guest: int) -> int:
        return len(verdict([rename, call(at, "lstat", "d1/y", result=[99, 0o100600, 0, 0, 0], guest=guest)], Promise.BOUNDED).violations)

    assert seen_at(5, 1) == 0
    assert seen_at(5, 0) == 1
    assert seen_at(2000, 1) == 1


# --- the choice of calls ---


def a_workload(seed: str, worker: int = 0, workers: int = 2) -> Workload:
    return Workload(Random(seed), worker=worker, workers=workers, groups=3)


def test_workload_is_decided_by_its_seed() -> None:
    runs = [[a_workload(seed).change_attribute() for _ in range(1)] for seed in ("1", "1")]
    assert runs[0] == runs[1]
    looks = [[workload.look([0, 0, 0]) for _ in range(50)] for workload in (a_workload("1"), a_workload("1"), a_workload("2"))]
    assert looks[0] == looks[1] != looks[2]
    assert {step.op for step in looks[0]} <= set(LOOKS)


def test_no_value_is_written_twice_by_any_worker() -> None:
    """What the exact check of the attributes rests on."""
    values: defaultdict[Register, list[Any]] = defaultdict(list)
    for worker in range(3):
        workload = a_workload("7", worker, 3)
        for _ in range(5000):
            step = workload.change_attribute()
            values[Register(ATTRIBUTE_OF[step.op], step.path)].append(attribute_value(step))
    assert set(values) | {register for register in INITIAL if register.what == NAME} == set(INITIAL)
    for register, written_to in values.items():
        assert INITIAL[register] not in written_to
        assert len(set(written_to)) == len(written_to), register
        assert register.what in ("mode", "uid", "xattr", changed_attribute(register.path))


def test_outcome_of_every_change_of_names_is_certain() -> None:
    """Against a model of the names: what is refused is refused for a reason that the history understands."""
    workload = a_workload("3")
    names: Names = dict.fromkeys(names_of(1, 0))
    done: defaultdict[str, int] = defaultdict(int)
    refused: defaultdict[str, int] = defaultdict(int)
    for serial in range(5000):
        step = workload.change_name(names, serial)
        error = _refusal(step, names)
        assert error == 0 or error in ANSWERS[step.op], (step, names)
        (refused if error else done)[step.op] += 1
        if not error:
            names = after(step, names, made_by(step, serial) if step.op in CREATES else None)
            assert list(names) == names_of(1, 0)
    assert set(done) == {*CREATES, *REMOVES, *RENAMES, "link"}
    assert {"create", "unlink", "link", "rename-noreplace"} <= set(refused)


def _refusal(step: Step, names: Names) -> int:
    """What a file system answers: open(2), unlink(2), link(2), rename(2)."""
    source, target = names[step.path], names.get(step.other)
    if step.op in CREATES:
        return errno.EEXIST if source else 0
    if source is None:
        return errno.ENOENT
    if step.op in REMOVES:
        return 0 if source.is_directory == (step.op == "rmdir") else errno.EISDIR
    if step.op == "link" and source.is_directory:
        return errno.EPERM
    if step.op in ("link", "rename-noreplace"):
        return errno.EEXIST if target else 0
    if step.op == "rename-exchange":
        return 0 if target else errno.ENOENT
    if target is None:
        return 0
    return 0 if source.is_directory == target.is_directory and source.ino != target.ino else errno.EISDIR


# --- faults ---


def test_faults_are_named_by_the_operator() -> None:
    assert parse_faults("none") == ()
    assert parse_faults("all") == tuple(FAULTS)
    assert parse_faults("kill-agent, stop-agent,kill-agent") == ("kill-agent", "stop-agent")
    for wrong in ("", "kill-everybody", "all,kill-agent", "none,kill-agent"):
        with pytest.raises(UsageError, match="--faults"):
            parse_faults(wrong)


def test_faults_are_decided_by_the_seed() -> None:
    def some(seed: str) -> list[Any]:
        return list(islice(fault_sequence(Random(seed), tuple(FAULTS), 3), 100))

    assert some("1") == some("1") != some("2")
    assert {fault.kind for fault in some("1")} == set(FAULTS)
    for fault in some("1"):
        assert (fault.guest is not None) == FAULTS[fault.kind].of_guest
        assert fault.guest in (None, 0, 1, 2)
        low, high = FAULTS[fault.kind].hold_ms
        assert low * MS <= fault.hold_ns <= high * MS
    assert list(fault_sequence(Random("1"), (), 3)) == []

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
from coherency.protocol import MODES
from coherency.sim.calls import (
    ANSWERS,
    ATTRIBUTE_FILES,
    ATTRIBUTE_OF,
    CHANGES,
    CREATES,
    INITIAL_MODE,
    INSIDE,
    KEPT,
    LOOKS,
    NAMES,
    PAGE_BYTES,
    RACE,
    REMOVES,
    RENAMES,
    TREE,
    UNIQUE_CHANGES,
    Group,
    Names,
    Scene,
    Step,
    after,
    changed_attribute,
    kept_file,
    kind_of,
    made_by,
)
from coherency.sim.faults import FAULTS, GROUPS, START_NS, Fault, fault_sequence, parse_faults, patience_ns
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
from coherency.sim.verdict import AUTO_TIMEOUT_NS, PROMISES, Promise, Verdict, describe, judge
from coherency.sim.waits import Delay, Faults, Window, unexplained_waits
from coherency.sim.workload import Kept, Workload, after_kept

INITIAL = initial_values({path: 100 + number for number, path in enumerate(ATTRIBUTE_FILES)})
SIZED, DATED = "a/size0", "a/mtime0"
FILE = Entry(stat.S_IFREG | 0o640, 7)
LINK = Entry(stat.S_IFLNK | 0o777, 8, "elsewhere")
MS = 1_000_000


GROUP = Group(NAMES, 1)
SCENE = Scene(names=3, trees=2, kept=2, races=2)


def call(at: int, op: str, path: str, other: str = "", number: int = 0, *, guest: int = 0, **rest: Any) -> Call:
    """A call from ``at`` ms on that takes one ms."""
    rest = {"error": 0, **rest}
    return Call(guest, guest, at * MS, (at + 1) * MS, Step(op, path, other, number), **rest)


def stat_result(path: str, *, mode: int = INITIAL_MODE, uid: int = 0, size: int = 0, mtime: int = mtime_ns(0)) -> list[int]:
    return [100 + ATTRIBUTE_FILES.index(path), stat.S_IFREG | mode, uid, size, mtime, 1]


def verdict(
    calls: Sequence[Call],
    promise: Promise = Promise.LINEARIZABLE,
    windows: Sequence[Window] = (),
    delays: Sequence[Delay] = (),
) -> Verdict:
    return judge(calls, INITIAL, windows, promise, delays=delays)


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
    for op in UNIQUE_CHANGES:
        path = DATED if op == "utime" else SIZED
        step = Step(op, path, "", 5)
        assert written([call(0, op, path, number=5)], ATTRIBUTE_OF[op], path)[-1] == attribute_value(step)
    assert seen([call(0, "getxattr", SIZED, result="5")], "xattr", SIZED) == [attribute_value(Step("setxattr", SIZED, "", 5))]


def test_rename_writes_both_names() -> None:
    plain = [call(0, "rename", "d0/g", "d1/h", source=FILE, target=LINK)]
    assert written(plain, NAME, "d0/g") == [None, None]
    assert written(plain, NAME, "d1/h") == [None, FILE]
    exchanged = [call(0, "rename-exchange", "d0/g", "d1/h", source=FILE, target=LINK)]
    assert written(exchanged, NAME, "d0/g") == [None, LINK]
    assert written(exchanged, NAME, "d1/h") == [None, FILE]
    assert seen(exchanged, NAME, "d0/g") == seen(exchanged, NAME, "d1/h") == [PRESENT]
    careful = [call(0, "rename-noreplace", "d0/g", "d1/h", source=FILE)]
    assert seen(careful, NAME, "d1/h") == [MISSING]


def test_refusals_are_looks() -> None:
    assert seen([call(0, "create", "d0/g", error=errno.EEXIST, source=FILE)], NAME, "d0/g") == [PRESENT]
    assert seen([call(0, "link", "d0/g", "d1/h", error=errno.EEXIST, source=FILE)], NAME, "d1/h") == [PRESENT]
    assert seen([call(0, "unlink", "d0/g", error=errno.ENOENT)], NAME, "d0/g") == [MISSING]
    assert seen([call(0, "readlink", "d0/g", error=errno.EINVAL)], NAME, "d0/g") == [NO_LINK]
    assert seen([call(0, "stat", "d0/g", error=errno.ENOENT)], NAME, "d0/g") == [NOWHERE]
    assert seen([call(0, "lstat", "d0/g", error=errno.ENOENT)], NAME, "d0/g") == [MISSING]
    assert seen([call(0, "chmod", SIZED, error=errno.ENOENT)], NAME, SIZED) == [MISSING]


def test_disturbed_change_may_have_happened_and_disturbed_look_saw_nothing() -> None:
    calls = [
        call(0, "truncate", SIZED, number=5, error=errno.EIO),
        call(2, "stat", SIZED, error=errno.ENOTCONN),
        call(4, "create", "d0/g", number=0o640, error=errno.EIO, made=FILE._replace(ino=None)),
    ]
    found = accesses(calls, INITIAL)
    assert not found[Register("size", SIZED)].writes[-1].certain
    assert not found[Register(NAME, "d0/g")].writes[-1].certain
    assert Register("mode", SIZED) in found
    assert found[Register("mode", SIZED)].reads == []
    assert found[Register(NAME, "d0/g")].reads == []


def test_link_to_what_the_kernel_believed_in_is_anything() -> None:
    calls = [call(0, "link", "d0/g", "d1/h", error=LOST, source=FILE), call(5, "lstat", "d1/h", result=[99, 0o100600, 0, 0, 0, 1])]
    assert written(calls, NAME, "d1/h") == [None, UNKNOWN]
    assert verdict(calls, Promise.BOUNDED).violations == ()
    assert agrees(PRESENT, UNKNOWN)
    assert not agrees(MISSING, UNKNOWN)


def test_listing_looks_at_every_name_of_its_directory() -> None:
    calls = [
        call(0, "create", "d0/g", made=FILE),
        call(2, "create", "d0/h", made=FILE),
        call(4, "listdir", "d0", result=["g"]),
    ]
    assert seen(calls, NAME, "d0/g")[-1] == PRESENT
    assert seen(calls, NAME, "d0/h")[-1] == MISSING
    assert [violation.where for violation in verdict(calls).violations] == ["d0/h"]


def test_listing_says_nothing_of_names_that_were_given_up_long_ago() -> None:
    """One change of the group was disturbed: the other names of that generation are not held against listings for ever."""
    calls = [
        call(0, "create", "d0/g0.0.a", made=FILE),
        call(2, "create", "d0/g0.0.c", error=errno.EIO, made=FILE),
        call(500, "listdir", "d0", result=["g0.0.a"]),
        call(5000, "listdir", "d0", result=[]),
    ]
    assert seen(calls, NAME, "d0/g0.0.a") == [MISSING, PRESENT]
    other = [calls[0], calls[3]]
    assert seen(other, NAME, "d0/g0.0.a") == [MISSING, MISSING], "nobody has given up anything"


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
        call(0, "create", "d0/g", made=FILE),
        call(10, "unlink", "d0/g", source=FILE),
        call(20, "exists", "d0/g", result=True, guest=1),
    ]
    assert [violation.calls for violation in verdict(calls).violations] == [tuple(calls)]
    assert verdict(calls, Promise.NOTHING).violations == ()
    assert verdict(calls, Promise.NOTHING).staleness.stale == 1


def test_inode_number_used_again_with_old_attributes_is_found() -> None:
    calls = [
        call(0, "create", "d0/g", made=FILE),
        call(10, "unlink", "d0/g", source=FILE),
        call(20, "create", "d0/g", made=FILE._replace(mode=stat.S_IFREG | 0o600)),
        call(30, "lstat", "d0/g", result=[FILE.ino, FILE.mode, 0, 0, 0, 1], guest=1),
    ]
    assert len(verdict(calls).violations) == 1


def test_errors_need_a_fault_of_that_time_and_guest() -> None:
    broken = [call(10, "stat", SIZED, error=errno.ENOTCONN, guest=1)]
    assert len(verdict(broken).violations) == 1
    assert verdict(broken, windows=[Window("x", 5 * MS, 10 * MS, (1,))]).violations == ()
    assert verdict(broken, windows=[Window("x", 5 * MS, 10 * MS, (0, 1))]).violations == ()
    for window in (Window("x", 5 * MS, 10 * MS, (0,)), Window("x", 5 * MS, 9 * MS, (1,)), Window("x", 5 * MS, 10 * MS, ())):
        assert len(verdict(broken, windows=[window]).violations) == 1
    lost = [call(10, "unlink", "d0/g", error=LOST, source=FILE)]
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


def test_the_timeout_is_longer_on_a_machine_that_is_late() -> None:
    timeout_ms = AUTO_TIMEOUT_NS // MS
    late = [Delay(500 * MS, 600 * MS, 90 * MS), Delay(700 * MS, 800 * MS, 80 * MS)]
    later = [Delay(2000 * MS, 2100 * MS, 90 * MS)]

    def at(stale_ms: int, delays: list[Delay]) -> int:
        look = call(11 + stale_ms, "stat", SIZED, result=stat_result(SIZED, size=0), guest=1)
        return len(verdict([call(10, "truncate", SIZED, number=5), look], Promise.BOUNDED, delays=delays).violations)

    assert [at(timeout_ms + more, late) for more in (20, 90, 120)] == [0, 0, 1]
    assert at(timeout_ms + 20, later) == 1


def test_auto_moves_what_it_believes_in() -> None:
    """A rename under a stale name shows, to that guest and for so long, what never was there."""
    rename = call(0, "rename", "d0/g", "d1/h", source=FILE, guest=1)

    def seen_at(at: int, guest: int) -> int:
        look = call(at, "lstat", "d1/h", result=[99, 0o100600, 0, 0, 0, 1], guest=guest)
        return len(verdict([rename, look], Promise.BOUNDED).violations)

    assert seen_at(5, 1) == 0
    assert seen_at(5, 0) == 1
    assert seen_at(2000, 1) == 1


# --- trees, kept files ---


HERE = Entry(stat.S_IFDIR | 0o755, 20, inside=30)
THERE = Entry(stat.S_IFDIR | 0o755, 21, inside=31)


def inside_result(ino: int) -> list[int]:
    return [ino, stat.S_IFREG | INITIAL_MODE, 0, 0, 0, 1]


def test_what_is_in_a_directory_moves_with_it() -> None:
    calls = [
        call(0, "mkdir", "d0/t0.0.a", number=0o755, made=HERE._replace(inside=None)),
        call(2, "create", "d0/t0.0.a/in", number=INITIAL_MODE, made=Entry(stat.S_IFREG | INITIAL_MODE, 30)),
        call(4, "rename", "d0/t0.0.a", "d1/t0.0.b", source=HERE),
        call(6, "lstat", "d1/t0.0.b/in", result=inside_result(30), guest=1),
        call(8, "stat", "d0/t0.0.a/in", error=errno.ENOENT, guest=1),
    ]
    assert verdict(calls).violations == ()
    stale = [*calls, call(10, "exists", "d0/t0.0.a/in", result=True, guest=1)]
    assert [violation.where for violation in verdict(stale).violations] == ["d0/t0.0.a/in"]


def test_exchanged_directories_take_along_what_is_in_them() -> None:
    calls = [
        call(0, "mkdir", "d0/t0.0.a", made=HERE),
        call(2, "create", "d0/t0.0.a/in", number=INITIAL_MODE, made=Entry(stat.S_IFREG | INITIAL_MODE, 30)),
        call(4, "mkdir", "d1/t0.0.b", made=THERE),
        call(6, "create", "d1/t0.0.b/in", number=INITIAL_MODE, made=Entry(stat.S_IFREG | INITIAL_MODE, 31)),
        call(8, "rename-exchange", "d0/t0.0.a", "d1/t0.0.b", source=HERE, target=THERE),
    ]
    assert verdict([*calls, call(10, "stat", "d0/t0.0.a/in", result=inside_result(31))]).violations == ()
    assert len(verdict([*calls, call(10, "stat", "d0/t0.0.a/in", result=inside_result(30))]).violations) == 1


KEPT_FILE, KEPT_NAME = "k/x0.0", "d0/x0.0.a"


def kept_result(*, size: int = 0, nlink: int = 1, mode: int = 0o640) -> list[int]:
    return [40, stat.S_IFREG | mode, 0, size, 0, nlink]


def kept_calls() -> list[Call]:
    made = Entry(stat.S_IFREG | 0o640, 40)
    return [
        call(0, "create", KEPT_FILE, number=0o640, made=made),
        call(2, "append", KEPT_FILE, "7", 7, source=made),
        call(4, "link", KEPT_FILE, KEPT_NAME, source=made),
        call(6, "open-truncate", KEPT_NAME, source=made),
        call(8, "setxattr", KEPT_FILE, number=3, source=made),
        call(10, "removexattr", KEPT_FILE, source=made),
        call(12, "fallocate", KEPT_FILE, number=7, source=made),
    ]


def test_attributes_of_a_kept_file_are_the_same_under_both_names() -> None:
    calls = kept_calls()
    for path in (KEPT_FILE, KEPT_NAME):
        assert verdict([*calls, call(20, "lstat", path, result=kept_result(size=7, nlink=2))]).violations == ()
        for wrong, where in [({"size": 0, "nlink": 2}, "size"), ({"size": 7}, "nlink"), ({"size": 7, "nlink": 2, "mode": 0o600}, "mode")]:
            found = verdict([*calls, call(20, "stat", path, result=kept_result(**wrong), guest=1)]).violations
            assert [violation.where for violation in found] == [f"{where} of {KEPT_FILE}"]


def test_xattr_that_was_removed_is_gone() -> None:
    calls = kept_calls()
    assert verdict([*calls, call(20, "getxattr", KEPT_NAME, error=errno.ENODATA, guest=1)]).violations == ()
    found = verdict([*calls, call(20, "getxattr", KEPT_FILE, result="3", guest=1)]).violations
    assert [[each.step.op for each in violation.calls] for violation in found] == [["setxattr", "removexattr", "getxattr"]]


def test_unlinking_the_second_name_is_a_change_of_the_links() -> None:
    calls = [*kept_calls(), call(14, "unlink", KEPT_NAME, source=Entry(stat.S_IFREG | 0o640, 40))]
    assert verdict([*calls, call(20, "fstat", KEPT_FILE, result=kept_result(size=7))]).violations == ()
    assert len(verdict([*calls, call(20, "fstat", KEPT_FILE, result=kept_result(size=7, nlink=2))]).violations) == 1


def test_value_that_returns_is_no_excuse_for_what_was_between() -> None:
    """The size was 7, then 0, then 7: who sees 7 while it was 0 for the whole time is wrong."""
    calls = kept_calls()
    assert len(verdict([*calls[:4], call(8, "stat", KEPT_FILE, result=kept_result(size=7, nlink=2), guest=1)]).violations) == 1


def test_open_create_of_what_is_there_is_a_look() -> None:
    there = [call(0, "create", "d0/g0.0.a", number=0o640, made=FILE)]
    seen_ino = [call(2, "open-create", "d0/g0.0.a", number=0o600, source=FILE, result=[FILE.ino, FILE.mode, 0, 0, 0, 1])]
    assert verdict([*there, *seen_ino]).violations == ()
    other = [call(2, "open-create", "d0/g0.0.a", number=0o600, source=FILE, result=[99, FILE.mode, 0, 0, 0, 1])]
    assert len(verdict([*there, *other]).violations) == 1
    made = [call(2, "open-create", "d0/g0.0.b", number=0o640, made=FILE)]
    assert verdict([*made, call(4, "lstat", "d0/g0.0.b", result=[FILE.ino, FILE.mode, 0, 0, 0, 1])]).violations == ()
    assert len(verdict([*made, call(4, "lstat", "d0/g0.0.b", error=errno.ENOENT)]).violations) == 1


def test_descriptor_that_a_fault_has_spoilt_may_be_found_out_later() -> None:
    window = [Window("x", 5 * MS, 10 * MS, (0,))]
    late = call(50, "fstat", SIZED, error=errno.ESTALE)
    assert verdict([late._replace(result=2 * MS)], windows=window).violations == ()
    assert len(verdict([late._replace(result=20 * MS)], windows=window).violations) == 1


# --- waits ---


def slow(took_ms: int, *, guest: int = 0) -> Call:
    return call(100, "stat", SIZED, result=stat_result(SIZED), guest=guest)._replace(end_ns=(100 + took_ms) * MS)


def test_wait_needs_an_explanation() -> None:
    stop = Window("stop", 50 * MS, 3000 * MS, (), 1, 300 * MS, 2000 * MS)
    assert verdict([slow(900)]).violations == ()
    assert [violation.calls for violation in verdict([slow(1100)]).violations] == [(slow(1100),)]
    for promise in Promise:
        assert len(verdict([slow(1100)], promise).violations) == 1
    assert verdict([slow(2900)], windows=[stop]).violations == ()
    assert len(verdict([slow(3100)], windows=[stop]).violations) == 1, "longer than a lease"
    assert verdict([slow(1200, guest=1)], windows=[stop]).violations == ()
    assert len(verdict([slow(1400, guest=1)], windows=[stop]).violations) == 1, "its own guest waits for as long as it was stopped"
    over = Window("over", 10 * MS, 99 * MS, (), None, 0, 9000 * MS)
    assert len(verdict([slow(1100)], windows=[over]).violations) == 1, "a fault that was over"


def test_late_machine_is_an_explanation() -> None:
    busy = [Delay(90 * MS, 400 * MS, 300 * MS), Delay(500 * MS, 900 * MS, 390 * MS), Delay(9000 * MS, 9900 * MS, 800 * MS)]
    faults = Faults([], busy)
    assert unexplained_waits([slow(1600)], faults) == []
    assert [wait.allowed_ns for wait in unexplained_waits([slow(1700)], faults)] == [1690 * MS]


def test_longest_calls_are_told_by_kind_and_fault() -> None:
    stop = Window("stop", 1000 * MS, 3000 * MS, (), 1, 0, 2000 * MS)
    calls = [slow(30), slow(20), call(1500, "stat", SIZED, result=stat_result(SIZED)), call(5000, "chmod", SIZED, number=1)]
    assert verdict(calls, windows=[stop]).longest == {"chmod": (1, MS, 0, ""), "stat": (3, 30 * MS, MS, "stop")}


# --- the choice of calls ---


GENERATIONS = dict.fromkeys(SCENE.groups(), 0)


def a_workload(seed: str, worker: int = 0, workers: int = 2) -> Workload:
    return Workload(Random(seed), SCENE, worker=worker, workers=workers)


def test_workload_is_decided_by_its_seed() -> None:
    runs = [[a_workload(seed).change_attribute() for _ in range(1)] for seed in ("1", "1")]
    assert runs[0] == runs[1]
    looks = [[workload.look(GENERATIONS) for _ in range(50)] for workload in (a_workload("1"), a_workload("1"), a_workload("2"))]
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
    names: Names = dict.fromkeys(SCENE.names_of(GROUP, 0))
    done: defaultdict[str, int] = defaultdict(int)
    refused: defaultdict[str, int] = defaultdict(int)
    for serial in range(5000):
        step = workload.change_name(names)
        error = _refusal(step, names)
        assert error == 0 or error in ANSWERS[step.op], (step, names)
        (refused if error else done)[step.op] += 1
        if not error:
            makes = step.op in CREATES or (step.op == "open-create" and names[step.path] is None)
            names = after(step, names, made_by(step, serial) if makes else names[step.path])
            assert list(names) == SCENE.names_of(GROUP, 0)
    assert set(done) == {*CREATES, *REMOVES, *RENAMES, "link", "open-create"}
    assert {"create", "unlink", "link", "rename-noreplace"} <= set(refused)


def _refusal(step: Step, names: Names) -> int:
    """What a file system answers: open(2), unlink(2), link(2), rename(2)."""
    source, target = names[step.path], names.get(step.other)
    if step.op in CREATES:
        return errno.EEXIST if source else 0
    if step.op == "open-create":
        return 0 if source is None or source.is_regular else errno.EISDIR
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


def test_paths_tell_their_kind() -> None:
    for group in SCENE.groups():
        for path in SCENE.names_of(group, 12):
            assert kind_of(path) == group.kind
    assert kind_of(kept_file(Group(KEPT, 0), 3)) == KEPT
    assert [kind_of(path) for path in (SIZED, "d0", "a", "k")] == [None] * 4


def test_trees_are_made_and_then_moved() -> None:
    workload, group = a_workload("4"), Group(TREE, 0)
    names: Names = dict.fromkeys(SCENE.names_of(group, 0))
    ops = []
    for serial in range(200):
        step = workload.change_tree(names)
        ops.append(step.op)
        if step.path.endswith(f"/{INSIDE}"):
            directory = step.path.removesuffix(f"/{INSIDE}")
            entry = names[directory]
            assert entry is not None
            assert entry.inside is None
            names[directory] = entry._replace(inside=serial)
        else:
            assert _refusal(step, names) == 0
            names = after(step, names, made_by(step, serial) if step.op in CREATES else None)
    assert ops[:4] == ["mkdir", "create", "mkdir", "create"]
    assert set(ops[4:]) == set(RENAMES)


def test_kept_files_are_changed_in_all_ways() -> None:
    workload, kept = a_workload("5"), Kept()
    ops = set()
    for _ in range(500):
        step = workload.change_kept(KEPT_FILE, KEPT_NAME, kept)
        assert step.path == KEPT_FILE or kept.linked
        ops.add(step.op)
        if step.op in ("append", "copy_file_range"):
            assert step.number == kept.size + int(step.other)
            assert kept.size // PAGE_BYTES == (step.number - 1) // PAGE_BYTES, "written at once"
        kept = after_kept(step, kept, FILE)
    sizes = {"append", "open-truncate", "fallocate", "copy_file_range"}
    assert ops == {"create", *sizes, "setxattr", "removexattr", "fchmod", "link", "unlink"}


def test_looks_are_at_what_is_being_changed() -> None:
    workload = a_workload("8")
    places: list[Group | str] = [*SCENE.groups(), *ATTRIBUTE_FILES]
    for place in places:
        for _ in range(50):
            step = workload.look_at(place, GENERATIONS)
            directories = {path.partition("/")[0] for path in (SIZED, *SCENE.names_of(SCENE.groups()[0], 0))}
            if step.op == "listdir":
                assert step.path in directories
            elif isinstance(place, str):
                assert step.path == place
            else:
                assert kind_of(step.path) == place.kind


def test_every_change_and_every_look_is_chosen() -> None:
    workload = a_workload("6")
    looks = [workload.look(GENERATIONS) for _ in range(3000)]
    assert {step.op for step in looks} == set(LOOKS)
    assert {kind_of(step.path) for step in looks} >= {None, NAMES, TREE, KEPT, RACE}
    races = {workload.race(SCENE.names_of(Group(RACE, 0), 0)).op for _ in range(300)}
    assert races == {"create", "symlink", "unlink", *RENAMES}
    chosen = {workload.pick_group() for _ in range(300)}
    assert chosen == {None, *SCENE.groups()}
    assert set(ANSWERS) == CHANGES | set(LOOKS)


# --- faults ---


def test_faults_are_named_by_the_operator() -> None:
    assert parse_faults("none") == ()
    assert parse_faults("all") == tuple(FAULTS)
    assert parse_faults("kill-agent, stop-agent,kill-agent") == ("kill-agent", "stop-agent")
    assert parse_faults("kill,stop,cut,slow,daemon") == tuple(FAULTS)
    assert parse_faults("cut,mute-channel") == GROUPS["cut"]
    for wrong in ("", "kill-everybody", "all,kill-agent", "none,kill-agent"):
        with pytest.raises(UsageError, match="--faults"):
            parse_faults(wrong)


def test_faults_are_decided_by_the_seed() -> None:
    def some(seed: str) -> list[Any]:
        return list(islice(fault_sequence(Random(seed), tuple(FAULTS), 3, 4_000 * MS), 100))

    assert some("1") == some("1") != some("2")
    for start in range(0, 100, len(FAULTS)):
        assert {fault.kind for fault in some("1")[start : start + len(FAULTS)]} == set(FAULTS), "each before any comes again"
    for fault in some("1"):
        assert (fault.guest is not None) == FAULTS[fault.kind].of_guest
        assert fault.guest in (None, 0, 1, 2)
        low, high = FAULTS[fault.kind].hold
        assert low * 4_000 * MS <= fault.hold_ns <= high * 4_000 * MS
        assert (fault.delay_ns > 0) == (fault.kind in GROUPS["slow"])
    assert list(fault_sequence(Random("1"), (), 3)) == []


def test_stops_are_shorter_and_longer_than_a_lease() -> None:
    for kind in ("stop-agent", "cut-channel", "mute-channel"):
        low, high = FAULTS[kind].hold
        assert low < 0.1, kind
        assert high > 1, kind


def test_a_fault_explains_no_more_than_it_can() -> None:
    def patience(kind: str, *, delay_ns: int = 0, lease_ns: int = 2000 * MS) -> tuple[int, int]:
        return patience_ns(Fault(kind, 0, 0, 300 * MS, delay_ns), lease_ns, 3)

    assert patience("kill-agent")[1] == 0, "nobody else waits for a killed agent"
    assert patience("stop-agent") == (300 * MS, 2000 * MS)
    assert patience("stop-agent", lease_ns=0) == (300 * MS, 0), "without leases nobody waits for a stopped agent"
    assert patience("slow-acks", delay_ns=50 * MS) == (2200 * MS, 2200 * MS)
    assert patience("kill-daemon")[1] == 300 * MS + START_NS + 2000 * MS

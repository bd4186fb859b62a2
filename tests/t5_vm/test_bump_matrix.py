"""Each row of `docs/spec/bump-matrix.md` between two virtual machines, and from the host: what one changes, the others see.

In `strict` and `access` at their very next look, in `prompt` soon. The observers have looked before. What is right is what the
share itself says; what they are asked is what the row changes, so an old answer is always a wrong one. What the host changes directly
in the share they see soon.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.bump_matrix.calls import CALLS, LIMITED, daemon_files_at_most
from tests.bump_matrix.ground import differences, lay
from tests.t5_vm import rows
from tests.t5_vm.bed import NAMES, Bed
from tests.vm.lines import Pending
from tests.waiting import until

DEADLINE_S = 120.0
HOST = "host"
CHANGERS = (*NAMES, HOST)
CHANGES_NOTHING = {"tmpfile"}
WITHOUT_A_NAME = {"tmpfile", "link-tmpfile"}
"""Of these virtiofsd knows nothing: a guest is refused."""
MAKES_A_NAME = {"create", "mknod", "mkdir", "symlink", "link"}
"""Stock virtiofs keeps neither absent names nor listings, also in its mode `always`, and who lists a directory is told its attributes
afresh: of these rows it shows the past to who only looks at the directory."""

Look = dict[str, Any]
R = TypeVar("R")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("rehearsal")
    for row in CALLS:
        (directory / row).mkdir()
    return {row: rows.what_changes(row, directory / row) for row in CALLS}


@pytest.fixture(scope="module", params=["access", "prompt", "strict"])
def mode(request: pytest.FixtureRequest, bed: Bed) -> str:
    """Both machines have mounted ours in that mode; strict last, which is what the tests of `test_what_breaks` begin with."""
    mode: str = request.param
    bed.both_mounted(mode)
    return mode


class Play:
    """One row, played at the same time by each machine and by the host, each in its own tree; the other machines look."""

    def __init__(self, bed: Bed, row: str, above: str, asked: list[str]) -> None:
        self.bed, self.row, self.asked = bed, row, asked
        self.trees = {changer: f"{above}/{row}.{changer}" for changer in CHANGERS}
        for tree in self.trees.values():
            (bed.host.share / tree).mkdir(parents=True)
            lay(bed.host.share / tree)

    def act(self, function: Callable[..., R], *arguments: object) -> dict[str, R]:
        """Call a function where the row is played, with the place of the tree as the last argument; by changer."""
        pending = {
            name: guest.machine.start_call(function, *arguments, guest.mountpoint / self.trees[name])
            for name, guest in self.bed.guests.items()
        }
        on_the_host = function(*arguments, self.bed.host.export / self.trees[HOST])
        return {name: each() for name, each in pending.items()} | {HOST: on_the_host}

    def truth(self) -> dict[str, Look]:
        """By changer."""
        return {changer: rows.answers(self.asked, self.bed.host.share / tree) for changer, tree in self.trees.items()}

    def seen(self) -> dict[tuple[str, str], Look]:
        """By observer and changer; all look at a time."""
        pending: dict[str, Pending[list[Look]]] = {
            name: guest.machine.start_call(
                rows.answers_of_all, self.asked,
                [guest.mountpoint / tree for changer, tree in self.trees.items() if changer != name],
            )
            for name, guest in self.bed.guests.items()
        }  # fmt: skip
        return {
            (name, changer): look
            for name, each in pending.items()
            for changer, look in zip([changer for changer in CHANGERS if changer != name], each(), strict=True)
        }

    def wrong(self, truth: dict[str, Look]) -> list[str]:
        """What observers say that is not true, a line each."""
        return [
            f"{observer} of what {changer} does: {difference}"
            for (observer, changer), look in self.seen().items()
            for difference in differences(truth[changer], look)
        ]

    def limits(self) -> AbstractContextManager[None]:
        if self.row not in LIMITED:
            return contextlib.nullcontext()
        return daemon_files_at_most(self.bed.host.daemon.process.pid, LIMITED[self.row])


@pytest.mark.parametrize("row", [row for row in CALLS if row not in CHANGES_NOTHING])
def test_others_see_it(bed: Bed, mode: str, questions: dict[str, list[str]], row: str) -> None:
    play = Play(bed, row, mode, questions[row])
    try:
        begun = play.act(rows.begin, row)
        before = play.truth()
        assert play.wrong(before) == []
        with play.limits():
            changed = play.act(rows.go_on)
        truth = play.truth()
        for changer in CHANGERS:
            if begun[changer] and changed[changer]:
                assert differences(before[changer], truth[changer]) != []
            else:
                assert row in WITHOUT_A_NAME
                assert changer != HOST
        if mode == "prompt":
            until(lambda: not play.wrong(truth))
        assert play.wrong(truth) == []
    finally:
        play.act(rows.end)


def test_what_the_host_changes_directly_in_the_share_is_seen_soon(bed: Bed, questions: dict[str, list[str]]) -> None:
    """Past the export nobody promises the very next look. So all rows at a time, half of them looked at by each machine."""
    guests = list(bed.both_mounted("strict").values())
    trees = {row: Path("direct", row) for row in CALLS if row not in rows.NEEDS_A_DAEMON}
    for tree in trees.values():
        (bed.host.share / tree).mkdir(parents=True)
        lay(bed.host.share / tree)

    def wrong() -> list[str]:
        """What is not as the share itself says."""
        pending = [
            (some, guest.machine.start_call(rows.answers_to, [(questions[row], guest.mountpoint / trees[row]) for row in some]))
            for guest, some in ((guest, list(trees)[number :: len(guests)]) for number, guest in enumerate(guests))
        ]
        return [
            f"{row}: {difference}"
            for some, each in pending
            for row, seen in zip(some, each(DEADLINE_S), strict=True)
            for difference in differences(rows.answers(questions[row], bed.host.share / trees[row]), seen)
        ]

    try:
        begun = {row: rows.begin(row, bed.host.share / tree) for row, tree in trees.items()}
        until(lambda: not wrong(), deadline_s=DEADLINE_S)
        before = {row: rows.answers(questions[row], bed.host.share / tree) for row, tree in trees.items()}
        changed = {row: rows.go_on(bed.host.share / tree) for row, tree in trees.items()}
        for tree in trees.values():
            rows.end(bed.host.share / tree)  # what was written by way of a mapping is told when the file is closed
        for row, tree in trees.items():
            assert (differences(before[row], rows.answers(questions[row], bed.host.share / tree)) != []) == (
                begun[row] and changed[row] and row not in CHANGES_NOTHING
            ), row
        until(lambda: not wrong(), deadline_s=DEADLINE_S)
    finally:
        for tree in trees.values():
            rows.end(bed.host.share / tree)


@pytest.mark.parametrize("row", [row for row in CALLS if row not in WITHOUT_A_NAME | set(LIMITED)])
def test_control_stock_always_shows_the_past(bed: Bed, questions: dict[str, list[str]], row: str) -> None:
    """The same rows and questions, without us: vm1 changes by stock virtiofs, vm2 looks by stock virtiofs."""
    tree = bed.stock / row
    tree.mkdir()
    lay(tree)
    changing, looking = bed.guests["vm1"].machine, bed.guests["vm2"].machine
    there, here = Path("/mnt/auto", row), Path("/mnt/always", row)  # by `none` no mapped file can be written
    asked = [question for question in questions[row] if row not in MAKES_A_NAME or not question.startswith("scandir")]
    assert changing.call(rows.begin, row, there)
    before = looking.call(rows.answers, asked, here)
    assert changing.call(rows.go_on, there)
    changing.call(rows.end, there)
    truth = rows.answers(asked, tree)
    assert differences(before, truth) != []
    assert differences(truth, looking.call(rows.answers, asked, here)) != []

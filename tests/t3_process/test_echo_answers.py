"""What the process that echoes is told, request by request: no mount, no process."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.events import Event, EventKind
from coherency.fuse import abi, codec, replies
from coherency.fuse.abi import ROOT_ID, Opcode
from coherency.fuse.codec import Request
from coherency.fuse.nodes import Node, NodeStore
from coherency.guest_agent import echo_process
from coherency.guest_agent.echo_jobs import EchoAnswers, EchoJob, Place, links
from coherency.guest_agent.echoes import Echoes
from coherency.ids import HostInode, NodeId
from coherency.protocol_events import Happened

STRANGER = 4711


class Desk:
    """Answers over a directory with one file, whose node the kernel has."""

    def __init__(self, root: Path) -> None:
        (root / "file").write_text("file")
        self.nodes = NodeStore(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), descriptor_limit=100)
        path = os.open(root / "file", os.O_PATH | os.O_CLOEXEC)
        self.root = self.nodes.root
        self.file = self.nodes.adopt(path, os.fstat(path), self.root, b"file")
        self.forgotten: list[NodeId] = []
        self.answers = EchoAnswers(self.nodes, self.forgotten.append, self._attributes)

    def _attributes(self, node: Node) -> bytes:
        with self.nodes.open(node) as fd:
            return replies.encode_attr(os.fstat(fd), node.ino)

    def ask(self, job: EchoJob | None, opcode: Opcode, body: Any, node: int = ROOT_ID) -> bytes | int:
        """The payload, or the errno."""
        try:
            return b"".join(self.answers.answer(job, Request(2, opcode, NodeId(node), 0, 0, STRANGER, body)))
        except OSError as error:
            return error.errno or -1

    def look_up(self, job: EchoJob, name: bytes) -> bytes | int:
        return self.ask(job, Opcode.LOOKUP, codec.Name(name))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.nodes.check()
    desk.nodes.close()


def node_in(answer: bytes | int) -> NodeId:
    assert isinstance(answer, bytes)
    return NodeId(int.from_bytes(answer[:8], "little"))


def times_in(answer: bytes | int) -> int:
    assert isinstance(answer, bytes)
    return sum(abi.entry_out.unpack_from(answer)[2:])


def remove(desk: Desk, shown: Node | int | None = None) -> EchoJob:
    return EchoJob(echo_process.REMOVE_FILE, Place(desk.root, b"file", desk.file if shown is None else shown))


UNLINK = (Opcode.UNLINK, codec.Name(b"file"))


def test_what_is_removed_is_there_until_it_is_removed(desk: Desk) -> None:
    job = remove(desk)
    found = desk.look_up(job, b"file")
    assert (node_in(found), times_in(found)) == (desk.file.id, 0)
    assert desk.forgotten == [desk.file.id], "the kernel takes no attributes of it"
    assert desk.ask(job, *UNLINK) == b""


def test_what_the_kernel_does_not_know_is_nowhere(desk: Desk) -> None:
    found = desk.look_up(remove(desk, stat.S_IFREG), b"file")
    assert node_in(found) not in (desk.file.id, ROOT_ID)
    assert times_in(found) == 0
    with pytest.raises(OSError, match="cannot be reached"):
        desk.nodes.open(desk.nodes.get(node_in(found)))


def test_what_is_made_is_not_there_and_then_nowhere(desk: Desk) -> None:
    job = EchoJob(echo_process.MAKE_FILE, Place(desk.root, b"new", 0), kind=stat.S_IFREG)
    assert desk.look_up(job, b"new") == errno.ENOENT
    made = desk.ask(job, Opcode.MKNOD, codec.Mknod(b"new", stat.S_IFREG, 0, 0))
    assert node_in(made) != desk.file.id
    assert times_in(made) == 0


def test_nothing_is_removed_that_was_not_looked_up_for_it(desk: Desk) -> None:
    """Else the kernel is sure of what it has there, and would remove that."""
    job = remove(desk)
    assert desk.ask(job, *UNLINK) == errno.EIO
    desk.look_up(job, b"file")
    assert desk.ask(job, Opcode.UNLINK, codec.Name(b"other")) == errno.EIO
    assert desk.ask(job, *UNLINK, node=desk.file.id) == errno.EIO
    assert desk.ask(remove(desk), *UNLINK) == errno.EIO, "not for that job"


def test_a_rename_needs_both_names(desk: Desk) -> None:
    job = EchoJob(echo_process.MOVE, Place(desk.root, b"file", desk.file), Place(desk.root, b"new", 0))
    rename = (Opcode.RENAME, codec.Rename(NodeId(ROOT_ID), 0, b"file", b"new"))
    desk.look_up(job, b"file")
    assert desk.ask(job, *rename) == errno.EIO
    assert desk.look_up(job, b"new") == errno.ENOENT
    assert desk.ask(job, *rename) == b""
    assert desk.file.name == b"new"


def test_when_a_job_is_over_everything_is_refused(desk: Desk) -> None:
    job = remove(desk)
    desk.look_up(job, b"file")
    job.over = True
    assert desk.ask(job, *UNLINK) == errno.EIO
    assert desk.look_up(job, b"file") == errno.EIO
    assert desk.ask(None, Opcode.GETATTR, codec.Getattr(0, 0)) == errno.EIO


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.OPEN, codec.Open(0, 0)),
        (Opcode.CREATE, codec.Create(b"file", 0, 0, 0, 0)),
        (Opcode.LOOKUP, codec.Name(b"other")),
        (Opcode.WRITE, codec.Write(1, 0, 0, memoryview(b"x"))),
        (Opcode.SETATTR, codec.Setattr(0, 0, 0, (0, 0), (0, 0), 0, 0, 0)),
        (Opcode.SETXATTR, codec.Setxattr(b"a", b"", 0, 0)),
        (Opcode.GETXATTR, codec.Getxattr(b"system.posix_acl_access", 100)),
    ],
)
def test_what_is_not_foreseen_is_refused(desk: Desk, opcode: Opcode, body: Any) -> None:
    assert desk.ask(remove(desk), opcode, body) in (errno.EIO, errno.ESTALE, errno.EACCES)


def test_only_the_thing_itself_is_touched_and_with_what_is_true_now(desk: Desk, tmp_path: Path) -> None:
    job = EchoJob(echo_process.MODIFY, thing=desk.file)
    setattr_ = (Opcode.SETATTR, codec.Setattr(0, 0, 0, (0, 0), (0, 0), 0, 0, 0))
    (tmp_path / "file").write_text("longer than before")
    answer = desk.ask(job, *setattr_, node=desk.file.id)
    assert isinstance(answer, bytes)
    assert abi.attr.unpack(answer[abi.attr_out.size :])[1] == len("longer than before")
    assert not any(answer[: abi.attr_out.size]), "for no time"
    assert desk.ask(job, *setattr_) == errno.ESTALE


def test_links_are_counted(desk: Desk, tmp_path: Path) -> None:
    os.link(tmp_path / "file", tmp_path / "other")
    assert links(replies.encode_attr(os.stat(tmp_path / "file"), HostInode(1))) == 2


# --- events that wait ---------------------------------------------------------------------------------------------


def event(kind: EventKind, number: int) -> Event:
    return Event(kind, HostInode(number), False, HostInode(1), b"name")


def test_events_that_do_not_fit_are_lost_and_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    echoes = Echoes(max_waiting=10)
    try:
        with caplog.at_level("INFO"):
            for number in range(15):
                echoes.hear(Happened(0, (event(EventKind.CREATED, number),)))
                echoes.check()
            echoes.hear(Happened(7, ()))
        assert (echoes.statistics().waiting, echoes.statistics().lost) == (10, 12)
        assert [record.levelname for record in caplog.records] == ["INFO"]
    finally:
        echoes.close()
        echoes.bury()


def test_a_change_of_data_that_waits_stands_for_the_next(caplog: pytest.LogCaptureFixture) -> None:
    echoes = Echoes()
    try:
        for _ in range(1000):
            echoes.hear(Happened(0, (event(EventKind.MODIFIED, 1), event(EventKind.MODIFIED, 2))))
        assert echoes.statistics().waiting == 2
        for _ in range(2):
            echoes.hear(Happened(0, (event(EventKind.CREATED, 1),)))
        assert echoes.statistics().waiting == 4, "each of these is another one"
        echoes.check()
    finally:
        echoes.close()
        echoes.bury()

"""The store of nodes against a simple model, over a real directory whose names change all the time.

The model: every object has a token, which it carries as its owner. What the kernel knows is a number of look-ups per node
id, and the token of the object that the node was given for. Whatever is opened shows that token, or is ESTALE.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import ClassVar, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from coherency.fuse import syscalls
from coherency.fuse.abi import ROOT_ID
from coherency.fuse.nodes import Node, NodeStore
from tests.descriptors import open_descriptors

NAMES = ["a", "b", "c"]
PLACES = ["", "d", "d/e"]
some_name = st.sampled_from(NAMES)
some_place = st.sampled_from(PLACES)
any_index = st.integers(0, 30)

T = TypeVar("T")


def pick(sequence: Sequence[T], index: int) -> T:
    return sequence[index % len(sequence)]


@dataclass
class Known:
    """What the kernel knows under one node id."""

    node: Node
    token: int
    lookups: int


class NodeMachine(RuleBasedStateMachine):
    """A tree of three directories, and a kernel that looks names up, uses nodes and forgets them."""

    store_type: ClassVar[type[NodeStore]] = NodeStore
    limit: ClassVar[int] = 4
    pin: ClassVar[bool] = True
    numbers_return: ClassVar[bool] = (
        False  # inode numbers are used again as soon as possible, whatever the file system does
    )

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="coh-nodes-")
        self.tokens = count(1)
        self.numbers: dict[int, int] = {}
        for place in ("d", "d/e"):
            os.mkdir(self._path(place))
            self._mark(self._path(place))
        self.descriptors_before = open_descriptors()
        self.store = self.store_type(self._open_root(), descriptor_limit=self.limit, descriptors_pin=self.pin)
        self.known: dict[int, Known] = {}
        self.ids_ever: set[int] = {ROOT_ID}

    # --- the tree ---

    def _open_root(self) -> int:
        return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def _mark(self, path: str) -> None:
        os.chown(path, next(self.tokens), -1)

    def _existing(self) -> set[int]:
        return {
            os.lstat(os.path.join(directory, name)).st_uid
            for directory, names, files in os.walk(self.root)
            for name in (*names, *files)
        }

    def _exists(self, token: int) -> bool:
        return token in self._existing()

    def _status(self, path: str) -> os.stat_result:
        status = os.lstat(path)
        if not self.numbers_return:
            return status
        if status.st_uid not in self.numbers:
            used = {number for token, number in self.numbers.items() if self._exists(token)}
            self.numbers[status.st_uid] = next(number for number in count(1) if number not in used)
        return os.stat_result((status.st_mode, self.numbers[status.st_uid], *status[2:]))

    @rule(place=some_place, name=some_name)
    def create(self, place: str, name: str) -> None:
        path = self._path(place, name)
        if not os.path.lexists(path):
            os.mknod(path)
            self._mark(path)

    def _files(self) -> list[tuple[str, str]]:
        return [(place, name) for place in PLACES for name in NAMES if os.path.lexists(self._path(place, name))]

    @precondition(lambda self: self._files())
    @rule(index=any_index)
    def unlink(self, index: int) -> None:
        os.unlink(self._path(*pick(self._files(), index)))

    @precondition(lambda self: self._files())
    @rule(index=any_index, place=some_place, name=some_name, tell=st.booleans())
    def rename(self, index: int, place: str, name: str, tell: bool) -> None:
        """By the kernel, which tells the store, or behind its back."""
        old = self._path(*pick(self._files(), index))
        status = self._status(old)
        os.rename(old, self._path(place, name))
        directory = self._known_directory(place)
        if tell and directory is not None:
            self.store.moved((status.st_dev, status.st_ino), directory, os.fsencode(name))

    @precondition(lambda self: self._files())
    @rule(index=any_index, place=some_place, name=some_name)
    def link(self, index: int, place: str, name: str) -> None:
        if not os.path.lexists(self._path(place, name)):
            os.link(self._path(*pick(self._files(), index)), self._path(place, name))

    # --- the kernel ---

    def _known_directory(self, place: str) -> Node | None:
        if not place:
            return self.store.root
        token = os.stat(self._path(place)).st_uid
        return next((known.node for known in self.known.values() if known.token == token), None)

    def _proved(self, node: Node) -> bool:
        return node.handle is not None or (node.fd >= 0 and self.pin)

    @rule(index=any_index)
    def look_up(self, index: int) -> None:
        place, name = pick([*self._files(), ("", "d"), ("d", "e")], index)
        parent = self._known_directory(place)
        if parent is None:
            return
        proved = {node_id for node_id, known in self.known.items() if self._proved(known.node)}
        status = self._status(self._path(place, name))
        fd = os.open(self._path(place, name), os.O_PATH | os.O_NOFOLLOW)
        node = self.store.adopt(fd, status, parent, os.fsencode(name))
        assert node.ino == status.st_ino
        known = self.known.get(node.id)
        if known is None:
            assert node.id not in self.ids_ever, "an id is used twice"
            assert all(other.token != status.st_uid for other in self.known.values()), "one object, two nodes"
            self.ids_ever.add(node.id)
            self.known[node.id] = Known(node, status.st_uid, 1)
            return
        assert known.node is node
        known.lookups += 1
        if known.token != status.st_uid:
            assert node.id not in proved, "two objects, one node"
            assert not self._exists(known.token), "two objects that exist, one node"
            known.token = status.st_uid

    @precondition(lambda self: self.known)
    @rule(index=any_index)
    def remember(self, index: int) -> None:
        known = pick(list(self.known.values()), index)
        assert self.store.remember(known.node)
        known.lookups += 1

    @precondition(lambda self: self.known)
    @rule(index=any_index, some=st.integers(1, 3))
    def forget(self, index: int, some: int) -> None:
        known = pick(list(self.known.values()), index)
        some = min(some, known.lookups)
        self.store.forget(known.node.id, some)
        known.lookups -= some
        if not known.lookups:
            del self.known[known.node.id]
            assert not self.store.remember(known.node)

    @precondition(lambda self: self.known)
    @rule(index=any_index)
    def use(self, index: int) -> None:
        known = pick(list(self.known.values()), index)
        try:
            with self.store.open(known.node) as fd:
                status = os.fstat(fd)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            assert known.node.fd < 0, "what holds a descriptor can be used"
            assert not (known.node.handle and self._exists(known.token)), "what has a handle and a name can be used"
            return
        if status.st_uid != known.token:
            assert not self._proved(known.node), "another object than it was"
            assert not self._exists(known.token), "another object, though it still exists"

    # --- the tree, mounted anew ---

    @rule()
    def rebase(self) -> None:
        for fd in self.store.rebase(self._open_root()):
            os.close(fd)

    # --- at any time ---

    @invariant()
    def holds(self) -> None:
        self.store.check()
        statistics = self.store.statistics()
        assert statistics.nodes == len(self.known) + 1
        assert statistics.descriptors <= self.limit
        assert len(open_descriptors() - self.descriptors_before) == 1 + statistics.descriptors
        for node_id, known in self.known.items():
            assert self.store.get(node_id) is known.node
            assert known.node.lookups == known.lookups

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)
        assert open_descriptors() <= self.descriptors_before


QUICK = settings(max_examples=25, stateful_step_count=40)


class AllByDescriptor(NodeMachine):
    limit = 1000


class AllByHandle(NodeMachine):
    limit = 1
    numbers_return = True


class DescriptorsProveNothing(NodeMachine):
    pin = False
    numbers_return = True


class AllByName(NodeMachine):
    """Only where the file system has no handles: see the test."""

    limit = 1


@pytest.mark.parametrize("machine", [NodeMachine, AllByDescriptor, AllByHandle, DescriptorsProveNothing])
def test_nodes_are_what_they_were_given_for(machine: type[NodeMachine]) -> None:
    run_state_machine_as_test(machine, settings=QUICK)


# --- negative controls: what breaks a rule is caught by the same machine ---


class NumbersBelieved(NodeStore):
    """Breaks rule 3: an inode number is enough."""

    def _same(self, node: Node, handle: bytes | None) -> bool:
        return True


class FirstForgetCounts(NodeStore):
    """Breaks rule 1: the first FORGET is the last."""

    def forget(self, node_id: int, count: int) -> None:
        super().forget(node_id, 1 << 30)


class NoLimit(NodeStore):
    """Breaks rule 4."""

    def adopt(self, fd: int, status: os.stat_result, parent: Node, name: bytes) -> Node:
        self._limit += 1
        return super().adopt(fd, status, parent, name)


def numbers_return(machine: NodeMachine) -> None:
    machine.create("", "a")
    machine.look_up(0)
    machine.unlink(0)
    machine.create("", "b")
    machine.look_up(0)


def forgotten_too_early(machine: NodeMachine) -> None:
    machine.look_up(0)
    machine.look_up(0)
    machine.forget(0, 1)


def many(machine: NodeMachine) -> None:
    machine.look_up(0)


@pytest.mark.parametrize(
    ("broken", "story"), [(NumbersBelieved, numbers_return), (FirstForgetCounts, forgotten_too_early), (NoLimit, many)]
)
def test_broken_rule_is_caught(broken: type[NodeStore], story: Callable[[NodeMachine], None]) -> None:
    for store, caught in ((NodeStore, False), (broken, True)):
        machine = type("Machine", (AllByHandle,), {"store_type": store})()
        try:
            with pytest.raises((AssertionError, OSError)) if caught else nullcontext():
                story(machine)
                machine.holds()
        finally:
            machine.teardown()


# --- without handles: number and type are believed where there is no descriptor ---


def test_without_handles_nothing_that_exists_is_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "file_handle", lambda fd: None)
    run_state_machine_as_test(AllByName, settings=QUICK)
    run_state_machine_as_test(NodeMachine, settings=QUICK)

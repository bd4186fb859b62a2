"""Nodes over real directories: which inode is which node, how it is reached, and what becomes of descriptors."""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherency.fuse import nodes, syscalls
from coherency.fuse.abi import ROOT_ID
from coherency.fuse.nodes import Node, NodeStore
from tests.descriptors import open_descriptors

O_NODE = os.O_PATH | os.O_NOFOLLOW
MANY = 1000


def open_root(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


def look_up(store: NodeStore, parent: Node, name: str) -> Node:
    with store.open(parent) as at:
        fd = os.open(name, O_NODE, dir_fd=at)
    return store.adopt(fd, os.fstat(fd), parent, os.fsencode(name))


def status(store: NodeStore, node: Node) -> os.stat_result:
    with store.open(node) as fd:
        return os.fstat(fd)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before  # what earlier tests have left may go meanwhile


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NodeStore]:
    """With room for all descriptors."""
    made = NodeStore(open_root(tmp_path), descriptor_limit=MANY)
    yield made
    made.check()
    made.close()
    made.close()


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[NodeStore]:
    """With a descriptor for the root only: everything is reached by its handle."""
    made = NodeStore(open_root(tmp_path), descriptor_limit=1)
    yield made
    made.check()
    assert made.statistics().descriptors == 1
    made.close()


@pytest.fixture
def nameful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeStore]:
    """Likewise on a file system without handles: everything is reached by its name."""
    monkeypatch.setattr(syscalls, "file_handle", lambda fd: None)
    made = NodeStore(open_root(tmp_path), descriptor_limit=1)
    yield made
    made.check()
    made.close()


ANY = pytest.mark.parametrize("kind", ["store", "crowded", "nameful"])


# --- identity ---


@ANY
def test_two_names_of_an_inode_are_one_node(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store: NodeStore = request.getfixturevalue(kind)
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").touch()
    a, b, c = (look_up(store, store.root, name) for name in "abc")
    assert a is b
    assert a is not c
    assert (a.lookups, c.lookups) == (2, 1)
    assert store.get(a.id) is a
    assert a.ino == os.stat(tmp_path / "a").st_ino
    assert store.statistics().nodes == 3


def test_number_used_again_is_another_node(crowded: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    (tmp_path / "new").touch()
    old = look_up(crowded, crowded.root, "old")
    (tmp_path / "old").unlink()
    fd = os.open(tmp_path / "new", O_NODE)
    same_number = os.stat_result((os.fstat(fd).st_mode, *old.key[::-1], *os.fstat(fd)[3:]))
    new = crowded.adopt(fd, same_number, crowded.root, b"new")
    assert new is not old
    assert new.key == old.key
    assert crowded.get(old.id) is old
    with pytest.raises(OSError, match="not at its name"):
        status(crowded, old)
    assert status(crowded, new).st_ino == os.stat(tmp_path / "new").st_ino


def test_number_used_again_by_another_type_is_another_node(nameful: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    node = look_up(nameful, nameful.root, "x")
    (tmp_path / "x").unlink()
    (tmp_path / "x").mkdir()
    node.key = (node.key[0], os.stat(tmp_path / "x").st_ino)  # if the file system has not used it again by itself
    nameful._by_key[node.key] = node
    assert look_up(nameful, nameful.root, "x") is not node
    with pytest.raises(OSError, match="another inode"):
        status(nameful, node)


def test_ids_are_never_used_twice(store: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    ids = set()
    for _ in range(5):
        node = look_up(store, store.root, "a")
        ids.add(node.id)
        store.forget(node.id, 1)
    assert len(ids) == 5


def test_without_pinning_the_handle_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over another FUSE server a descriptor proves nothing."""
    handles = iter([b"first", b"first", b"second"])
    monkeypatch.setattr(syscalls, "file_handle", lambda fd: next(handles))
    store = NodeStore(open_root(tmp_path), descriptor_limit=MANY, descriptors_pin=False)
    (tmp_path / "a").touch()
    first, again, second = (look_up(store, store.root, "a") for _ in range(3))
    assert first is again
    assert second is not first
    store.check()
    store.close()


# --- look-ups given and given back ---


@ANY
def test_forget(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store: NodeStore = request.getfixturevalue(kind)
    (tmp_path / "a").touch()
    node = look_up(store, store.root, "a")
    assert look_up(store, store.root, "a") is node
    assert store.remember(node)
    store.forget(node.id, 2)
    store.check()
    assert store.get(node.id) is node
    store.forget(node.id, 1)
    with pytest.raises(OSError, match="unknown node") as caught:
        store.get(node.id)
    assert caught.value.errno == errno.ESTALE
    assert not store.remember(node)
    assert store.statistics() == nodes.NodeStatistics(nodes=1, descriptors=1)


def test_too_much_given_back_does_no_harm(store: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    node = look_up(store, store.root, "a")
    store.forget(node.id, 99)
    store.forget(node.id, 1)
    store.forget(12345, 1)
    assert store.statistics().nodes == 1


def test_the_root_stays(store: NodeStore) -> None:
    store.forget(ROOT_ID, 1 << 40)
    assert store.get(ROOT_ID) is store.root


def test_old_node_that_goes_leaves_the_new_one_of_its_number(crowded: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    old = look_up(crowded, crowded.root, "a")
    old.handle = b"that of another inode, once"
    new = look_up(crowded, crowded.root, "a")
    assert new is not old
    crowded.forget(old.id, 1)
    assert look_up(crowded, crowded.root, "a") is new


def test_pinned(store: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    node = look_up(store, store.root, "a")
    assert store.pinned(node.ino, store.root, b"a") is node
    assert node.lookups == 2
    assert store.pinned(node.ino, store.root, b"b") is None
    assert node.lookups == 2


# --- reaching what has no descriptor ---


@pytest.mark.parametrize("kind", ["crowded", "nameful"])
def test_every_type_is_reached(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store: NodeStore = request.getfixturevalue(kind)
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "device", 0o20600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fsencode(tmp_path / "socket"))
    for name in os.listdir(tmp_path):
        node = look_up(store, store.root, name)
        assert node.fd < 0
        assert os.path.samestat(status(store, node), os.lstat(tmp_path / name)), name


@pytest.mark.parametrize("kind", ["crowded", "nameful"])
def test_deep_in_a_tree(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Deeper than Python's stack, and than any path that the kernel takes at once."""
    depth = sys.getrecursionlimit() + 500
    store: NodeStore = request.getfixturevalue(kind)
    at = os.open(tmp_path, os.O_RDONLY)
    node, chain = store.root, []
    for _ in range(depth):
        os.mkdir("deep", dir_fd=at)
        below = os.open("deep", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
        # Adopted without the store's way down, which would make this quadratic.
        fd = os.open(".", os.O_PATH, dir_fd=at)
        node = store.adopt(fd, os.fstat(fd), node, b"deep")
        chain.append(node)
    expected = os.fstat(at)
    os.close(at)
    assert os.path.samestat(status(store, node), expected)
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)  # shutil gives up at such a depth
    with pytest.raises(OSError, match=r"cannot be reached|not at its name"):
        status(store, node)


def test_moved_is_found_at_its_new_name(nameful: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "a").touch()
    directory, node = look_up(nameful, nameful.root, "d"), look_up(nameful, nameful.root, "a")
    os.rename(tmp_path / "a", tmp_path / "d/b")
    with pytest.raises(OSError, match="not at its name") as caught:
        status(nameful, node)
    assert caught.value.errno == errno.ESTALE
    nameful.moved(node.key, directory, b"b")
    assert status(nameful, node).st_ino == node.ino


def test_another_file_of_that_name_is_not_it(nameful: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    node = look_up(nameful, nameful.root, "a")
    os.rename(tmp_path / "b", tmp_path / "a")
    with pytest.raises(OSError, match="another inode") as caught:
        status(nameful, node)
    assert caught.value.errno == errno.ESTALE


def test_another_file_of_that_name_and_number_is_not_it(crowded: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "gone").touch()
    (tmp_path / "a").touch()
    gone, node = look_up(crowded, crowded.root, "gone"), look_up(crowded, crowded.root, "a")
    (tmp_path / "gone").unlink()
    # As if "a" had been made with the number, and in the place, of what is gone.
    node.handle = gone.handle
    with pytest.raises(OSError, match="another inode") as caught:
        status(crowded, node)
    assert caught.value.errno == errno.ESTALE


def test_symlink_in_place_of_a_directory_leads_nowhere(nameful: NodeStore, tmp_path: Path) -> None:
    inside = tmp_path / "d"
    inside.mkdir()
    (inside / "x").touch()
    directory = look_up(nameful, nameful.root, "d")
    node = look_up(nameful, directory, "x")
    shutil.move(inside, tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    for lost in (node, directory):
        with pytest.raises(OSError, match=r"another inode|not at its name") as caught:
            status(nameful, lost)
        assert caught.value.errno == errno.ESTALE


def test_cycle_of_names_ends(nameful: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = look_up(nameful, nameful.root, "a"), look_up(nameful, nameful.root, "b")
    nameful.moved(a.key, b, b"a")
    nameful.moved(b.key, a, b"b")
    with pytest.raises(OSError, match="cannot be reached"):
        status(nameful, a)


def test_open_file_is_a_way_to_a_node_without_a_name(nameful: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    node = look_up(nameful, nameful.root, "a")
    file = os.open(tmp_path / "a", os.O_RDONLY)
    (tmp_path / "a").unlink()
    nameful.lend(node, file)
    assert status(nameful, node).st_nlink == 0
    nameful.take_back(node, file)
    nameful.take_back(node, file)
    os.close(file)
    with pytest.raises(OSError, match="not at its name"):
        status(nameful, node)


def test_open_file_of_the_former_tree_is_none(nameful: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    node = look_up(nameful, nameful.root, "a")
    file = os.open(tmp_path / "a", os.O_RDONLY)
    nameful.lend(node, file)
    for fd in (*nameful.rebase(open_root(tmp_path)), file):
        os.close(fd)
    assert status(nameful, node).st_ino == node.ino
    nameful.take_back(node, file)


def test_handle_survives_a_rename(crowded: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    node = look_up(crowded, crowded.root, "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert status(crowded, node).st_ino == node.ino


def test_parent_that_was_forgotten_still_shows_the_way(nameful: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").touch()
    directory = look_up(nameful, nameful.root, "d")
    node = look_up(nameful, directory, "x")
    nameful.forget(directory.id, 1)
    assert status(nameful, node).st_ino == node.ino


def test_handles_of_another_file_system_are_not_kept(tmp_path: Path) -> None:
    """They could mean an inode of the root's, which is where they would be opened."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", mounted], check=True)
    try:
        (mounted / "x").touch()
        store = NodeStore(open_root(tmp_path), descriptor_limit=1)
        top = look_up(store, store.root, "mounted")
        node = look_up(store, top, "x")
        assert (top.handle, node.handle) == (None, None)
        assert os.path.samestat(status(store, node), os.stat(mounted / "x"))
        assert node.ino != os.stat(mounted / "x").st_ino  # guests see one device
        assert node.ino == store.number_on(node.key[0], node.key[1])
        store.check()
        store.close()
    finally:
        subprocess.run(["umount", mounted], check=True)


# --- descriptors ---


def test_descriptors_are_bounded_and_given_back(tmp_path: Path) -> None:
    store = NodeStore(open_root(tmp_path), descriptor_limit=3)
    made = []
    for number in range(6):
        (tmp_path / str(number)).touch()
        made.append(look_up(store, store.root, str(number)))
        store.check()
    assert [node.fd >= 0 for node in made] == [True, True, False, False, False, False]
    store.forget(made[0].id, 1)
    assert store.statistics() == nodes.NodeStatistics(nodes=6, descriptors=2)
    assert look_up(store, store.root, "4") is made[4]  # which takes the place
    assert made[4].fd >= 0
    for node in made[1:]:
        assert status(store, node).st_ino == node.ino
    store.close()
    assert store.statistics() == nodes.NodeStatistics(nodes=1, descriptors=0)


def test_descriptor_is_closed_where_its_handle_cannot_be_had(
    store: NodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> bytes:
        raise OSError(errno.EIO, "no")

    (tmp_path / "a").touch()
    monkeypatch.setattr(syscalls, "file_handle", fail)
    store._descriptors_pin = False
    with pytest.raises(OSError, match="no"):
        look_up(store, store.root, "a")
    assert store.statistics().nodes == 1


def test_nothing_is_reached_after_close(tmp_path: Path) -> None:
    store = NodeStore(open_root(tmp_path), descriptor_limit=MANY)
    store.close()
    with pytest.raises(OSError, match="cannot be reached"), store.open(store.root):
        pass
    store.check()


# --- the same tree, mounted anew ---


@ANY
def test_rebase(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store: NodeStore = request.getfixturevalue(kind)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").touch()
    directory = look_up(store, store.root, "d")
    node = look_up(store, directory, "x")
    abandoned = store.rebase(open_root(tmp_path))
    store.check()
    assert len(abandoned) == {"store": 4, "crowded": 2, "nameful": 2}[kind]
    for fd in abandoned:
        os.close(fd)
    assert (directory.fd, node.fd) == (-1, -1)
    assert status(store, node).st_ino == node.ino
    assert look_up(store, store.root, "d") is directory
    assert look_up(store, directory, "x") is node
    assert (node.fd >= 0) == (kind == "store")


def test_rebase_of_a_closed_store_gives_all_back(tmp_path: Path) -> None:
    store = NodeStore(open_root(tmp_path), descriptor_limit=MANY)
    store.close()
    for fd in store.rebase(open_root(tmp_path)):
        os.close(fd)


def test_rebase_onto_what_is_dead_keeps_nothing_open(store: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        store.rebase(os.open(tmp_path / "file", os.O_RDONLY))
    assert status(store, store.root).st_ino == os.stat(tmp_path).st_ino


# --- check() notices ---


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda store, node: setattr(node, "lookups", 0), "nobody knows"),
        (lambda store, node: setattr(store, "_descriptors", 7), "descriptor count"),
        (lambda store, node: setattr(store, "_limit", 1), "descriptor limit"),
        (lambda store, node: store._nodes.pop(node.id), "descriptor count|lost node"),
    ],
)
def test_check_notices(tmp_path: Path, damage: object, complaint: str) -> None:
    store = NodeStore(open_root(tmp_path), descriptor_limit=MANY)
    (tmp_path / "a").touch()
    node = look_up(store, store.root, "a")
    damage(store, node)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=complaint):
        store.check()
    store._nodes[node.id] = node
    store.close()


# --- how many there may be ---


def test_descriptor_budget_leaves_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        budget = nodes.descriptor_budget()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard
        assert budget == soft * 3 // 4
        assert soft >= before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

"""Nodes without a descriptor of their own are opened along their names, whatever happens to their parents meanwhile."""

import os
from pathlib import Path

import pytest

from coherency.fuse import syscalls
from coherency.fuse.nodes import Node, NodeStore

_O_NODE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def adopt(store: NodeStore, parent: Node, path: Path) -> Node:
    fd = os.open(path, _O_NODE)
    return store.adopt(fd, os.fstat(fd), parent, os.fsencode(path.name))


def test_a_parent_forgotten_meanwhile_costs_nobody_a_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may forget the parent of a node that a request is about, and its descriptor's number is used again."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/file").write_text("here")
    (tmp_path / "bystander").write_text("untouched")
    monkeypatch.setattr(syscalls, "file_handle", lambda fd: None)  # so that names are the only way
    store = NodeStore(os.open(tmp_path, os.O_RDONLY), descriptor_limit=2)
    directory = adopt(store, store.root, tmp_path / "directory")
    file = adopt(store, directory, tmp_path / "directory/file")
    assert directory.fd >= 0
    assert file.fd < 0
    freed, bystanders, really_open = directory.fd, [], os.open

    def open_after_forget(path: object, flags: int, **rest: int) -> int:
        if path == b"file":
            store.forget(directory.id, 1)
            bystanders.append(really_open(tmp_path / "bystander", os.O_RDONLY))
        return really_open(path, flags, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_after_forget)
    with store.open(file) as fd:
        assert os.fstat(fd).st_size == len("here")
    monkeypatch.undo()

    assert bystanders == [freed], "the number was not used again: the test shows nothing"
    assert os.read(bystanders[0], 100) == b"untouched"
    os.close(bystanders[0])
    store.check()
    store.close()


def test_a_number_in_a_listing_is_a_node_only_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("")
    (tmp_path / "two").write_text("")
    store = NodeStore(os.open(tmp_path, os.O_RDONLY), descriptor_limit=10)
    one = adopt(store, store.root, tmp_path / "one")
    assert store.pinned(one.ino, store.root, b"one") is one
    assert store.pinned(one.ino, store.root, b"two") is None
    store.close()

"""Pages of what was recalled: who has it dropped waits for the beginning of that, and not for I/O."""

import threading

import pytest

from coherency.guest_agent import pages
from coherency.guest_agent.pages import RecalledPages
from coherency.ids import NodeId
from tests.waiting import until

STUCK, OTHER = NodeId(1), NodeId(2)


class Kernel:
    """Of one inode a page is being written."""

    def __init__(self) -> None:
        self.dropped: list[NodeId] = []
        self.written = threading.Event()

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool:
        assert (offset, length) == (0, 0)
        if node == STUCK:
            assert self.written.wait(20)
        self.dropped.append(node)
        return True


def test_they_are_dropped_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PATIENCE_S", 20)
    kernel = Kernel()
    recalled = RecalledPages(kernel)
    for number in range(2, 5):
        recalled.drop(NodeId(number))
    recalled.await_begun()
    assert kernel.dropped == [2, 3, 4]
    recalled.close()


def test_one_that_waits_for_its_pages_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    recalled = RecalledPages(kernel)
    recalled.drop(STUCK)
    monkeypatch.setattr(pages, "PATIENCE_S", 0.01)
    recalled.await_begun()
    assert kernel.dropped == []
    monkeypatch.setattr(pages, "PATIENCE_S", 3600)
    recalled.drop(OTHER)
    recalled.await_begun()  # or this would take an hour
    assert kernel.dropped == []
    kernel.written.set()
    until(lambda: kernel.dropped == [STUCK, OTHER])
    recalled.drop(OTHER)
    recalled.await_begun()
    assert kernel.dropped == [STUCK, OTHER, OTHER]
    recalled.close()


def test_at_the_end_nobody_waits() -> None:
    kernel = Kernel()
    recalled = RecalledPages(kernel)
    recalled.drop(STUCK)
    recalled.drop(OTHER)
    kernel.written.set()
    recalled.close()
    assert not recalled._thread.is_alive()
    recalled.await_begun()

"""Dropping pages may wait for threads of the session: so few do it at a time, and nobody waits long for his turn."""

import threading

import pytest

from coherency.guest_agent import pages
from coherency.guest_agent.pages import Pages
from coherency.ids import NodeId
from tests.waiting import until


class SlowKernel:
    """Drops pages only when it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.may = threading.Event()

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool:
        self.asked += 1
        return self.may.wait(20)


def test_who_finds_too_many_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_PATIENCE_S", 0.01)
    kernel = SlowKernel()
    dropped = Pages()
    dropped.drop(NodeId(1))  # nobody is there yet
    dropped.belong_to(kernel)
    threads = [threading.Thread(target=dropped.drop, args=(NodeId(1),)) for _ in range(pages._MOST_AT_A_TIME)]
    for thread in threads:
        thread.start()
    until(lambda: kernel.asked == len(threads))
    dropped.drop(NodeId(1))
    assert kernel.asked == len(threads)
    kernel.may.set()
    for thread in threads:
        thread.join()
    dropped.drop(NodeId(1))
    assert kernel.asked == len(threads) + 1

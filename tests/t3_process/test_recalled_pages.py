"""Pages of what was recalled are dropped when the inode has been left alone for a moment, and not much later than that."""

import queue

from coherency.guest_agent.pages import AT_THE_LATEST_NS, LEFT_ALONE_NS, RecalledPages
from coherency.ids import NodeId

ONE, OTHER = NodeId(1), NodeId(2)


class Kernel:
    """Tells what was dropped, one after the other."""

    def __init__(self) -> None:
        self._dropped: queue.Queue[NodeId] = queue.Queue()

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool:
        assert (offset, length) == (0, 0)
        self._dropped.put(node)
        return True

    def first(self, count: int) -> list[NodeId]:
        return [self._dropped.get(timeout=20) for _ in range(count)]

    @property
    def has_dropped_more(self) -> bool:
        return not self._dropped.empty()


class World:
    """Its clock goes on when the test says so."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.kernel = Kernel()
        self.pages = RecalledPages(self.kernel, clock_ns=lambda: self.now_ns)


def test_who_is_left_alone_comes_first() -> None:
    world = World()
    world.pages.drop_later(ONE)
    world.pages.drop_later(OTHER)
    world.now_ns = LEFT_ALONE_NS // 2
    world.pages.drop_later(ONE)
    world.now_ns = LEFT_ALONE_NS
    assert world.kernel.first(1) == [OTHER]
    assert not world.kernel.has_dropped_more
    world.now_ns += LEFT_ALONE_NS // 2
    assert world.kernel.first(1) == [ONE]
    world.pages.close()


def test_who_is_never_left_alone_comes_at_last() -> None:
    world = World()
    while world.now_ns < AT_THE_LATEST_NS:
        world.pages.drop_later(ONE)
        assert not world.kernel.has_dropped_more
        world.now_ns += LEFT_ALONE_NS // 2
    assert world.kernel.first(1) == [ONE]
    world.pages.drop_later(ONE)  # and from then on anew
    world.now_ns += LEFT_ALONE_NS
    assert world.kernel.first(1) == [ONE]
    world.pages.close()


def test_at_the_end_the_thread_waits_for_nothing() -> None:
    world = World()
    world.pages.drop_later(ONE)
    world.pages.close()
    assert not world.pages._thread.is_alive()
    assert not world.kernel.has_dropped_more

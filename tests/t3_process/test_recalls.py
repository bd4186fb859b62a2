"""Changes that make guests forget, over real sockets: who is told, who is waited for, and who cannot keep anybody waiting."""

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coherency.daemon.origins import Origins, is_dying, process_of_thread
from coherency.daemon.recalls import Recalls
from coherency.daemon.switchboard import Limits
from coherency.fuse import codec
from coherency.fuse.abi import ROOT_ID, Opcode
from coherency.fuse.codec import Request
from coherency.guest_agent.client import fetch_status, invalidate
from coherency.ids import GrantKey, NodeId
from coherency.leases import MAX_KEYS_PER_MESSAGE
from coherency.protocol import Evicted, Goodbye, Recall, Register, Renewed, encode
from tests.control_daemon import ControlDaemon
from tests.scripted_guests import ScriptedGuest
from tests.waiting import until

A, B, C = GrantKey(2), GrantKey(5), GrantKey(8)
SECOND_NS = 10**9
SHORT_NS = SECOND_NS // 2
LONG_NS = 60 * SECOND_NS
"""A lease that does not end during a test: what does not end otherwise hangs."""
QUICK = Limits(statistics_ns=20_000_000)
"""Scripted guests do not tell their counters."""
DROPPED = r"dropping .*peer \d+ \(pid \d+, uid \d+\): "


class Host:
    """A daemon's control channel, and threads that make changes."""

    def __init__(self, root: Path, undo: contextlib.ExitStack, *, lease_ns: int = LONG_NS, **limits: int) -> None:
        self.daemon = undo.enter_context(
            ControlDaemon(root, "share-1", limits=replace(QUICK, **limits), lease_ns=lease_ns)
        )
        self.origins = Origins(self.daemon.leasing.has)
        self.dying: set[int] = set()
        self.recalls = Recalls(self.daemon.server, self.origins, is_dying=self.dying.__contains__)
        self._pool = undo.enter_context(ThreadPoolExecutor(16, "change"))
        undo.callback(self.recalls.give_up)
        self._undo = undo

    def guest(self, mode: str = "strict", *, former: int = 0, name: str = "scripted") -> ScriptedGuest:
        guest = ScriptedGuest(self.daemon.path, mode, former=former, name=name)
        self._undo.callback(guest.goodbye)
        return guest

    def change(self, *keys: GrantKey, request: Request | None = None) -> Future[int]:
        """A change in a thread of its own: how long it waited, in nanoseconds."""
        return self._pool.submit(self.wait_for_change, *keys, request=request)

    def wait_for_change(self, *keys: GrantKey, request: Request | None = None) -> int:
        began_ns = time.monotonic_ns()
        self.recalls.revoke(keys, request)
        return time.monotonic_ns() - began_ns

    def settle(self) -> None:
        """Until the daemon has dealt with all that was sent before."""
        fetch_status(self.daemon.root, self.daemon.name)


MakeHost = Callable[..., Host]


@pytest.fixture
def make_host(socket_dir: Path) -> Iterator[MakeHost]:
    with contextlib.ExitStack() as undo:
        yield lambda **options: Host(socket_dir, undo, **options)


def request_of(pid: int) -> Request:
    return Request(2, Opcode.UNLINK, NodeId(ROOT_ID), 0, 0, pid, codec.Name(b"name"))


# --- who is told, and who is waited for ----------------------------------------------------------------------------


def test_a_change_waits_for_exactly_the_strict_sharers_of_its_keys(make_host: MakeHost) -> None:
    host = make_host()
    one, two, other, prompt = host.guest(), host.guest(), host.guest(), host.guest("prompt")
    one.register(A, C)
    two.register(B)
    other.register(C)
    prompt.register(A)
    change = host.change(A, B)
    assert one.hear_recall() == Recall(one.session, 1, (A,))
    assert two.hear_recall() == Recall(two.session, 1, (B,))
    assert prompt.hear_recall() == Recall(prompt.session, 1, (A,))
    two.ack(1)
    host.settle()
    assert not change.done()
    one.ack(1)
    change.result(20)
    assert other.hears_nothing()


def test_negative_control_a_prompt_guest_alone_is_not_waited_for(make_host: MakeHost) -> None:
    host = make_host()
    prompt = host.guest("prompt")
    prompt.register(A)
    host.wait_for_change(A)
    assert not prompt.hears_nothing()


def test_a_change_of_what_nobody_has_sends_nothing_and_takes_no_lock(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A, B)
    guest.release(B)
    host.settle()
    with host.daemon.server._control_lock:
        sent = host.daemon.server.statistics().sent_bytes
        host.wait_for_change(B, C)
        shared = host.change(A)  # the negative control: this one needs the lock
        with pytest.raises(TimeoutError):
            shared.result(0.1)
        assert host.daemon.server.statistics().sent_bytes == sent
    guest.ack(guest.hear_recall().serial)
    shared.result(20)


def test_overlapping_changes_wait_for_the_same_ack(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A, B)
    first = host.change(A)
    assert guest.hear_recall().keys == (A,)
    second = host.change(A, B)  # has nothing to tell of A, but must not go on before that ack
    assert guest.hear_recall().keys == (B,)
    third = host.change(A)
    until(lambda: host.daemon.leasing.statistics().waiting == 3)
    guest.ack(1)
    first.result(20)
    third.result(20)
    assert not second.done()
    guest.ack(2)
    second.result(20)


# --- guests that do not answer -------------------------------------------------------------------------------------


@pytest.mark.expected_logs(DROPPED + "its lease of 0.5 s is over")
def test_a_silent_guest_delays_by_one_lease_once_and_is_evicted(make_host: MakeHost) -> None:
    host = make_host(lease_ns=SHORT_NS)
    joined_ns = time.monotonic_ns()
    guest = host.guest()
    guest.register(A, B)
    waited_ns = host.wait_for_change(A)
    assert SHORT_NS // 2 < waited_ns <= time.monotonic_ns() - joined_ns
    assert time.monotonic_ns() - joined_ns >= SHORT_NS
    assert guest.hear_recall().serial == 1
    assert guest.hear(Evicted).session == guest.session
    assert guest.next() is None
    assert not host.daemon.leasing.is_held((A, B))
    assert host.recalls.statistics().waits == 1
    assert host.wait_for_change(A, B) < SHORT_NS
    assert host.recalls.statistics().waits == 1


def test_a_guest_that_renews_and_acks_is_not_evicted(make_host: MakeHost) -> None:
    """The negative control."""
    host = make_host(lease_ns=SHORT_NS)
    guest = host.guest()
    guest.register(A)
    for serial in range(1, 11):
        time.sleep(SHORT_NS / SECOND_NS / 5)
        guest.renew()
        assert guest.hear(Renewed).session == guest.session
        change = host.change(A)
        guest.ack(guest.hear_recall().serial)
        change.result(20)
        guest.register(A)
        assert host.recalls.statistics().waits == serial
    assert host.daemon.leasing.statistics().evictions == 0


@pytest.mark.expected_logs(DROPPED + "its lease of 0.5 s is over")
def test_a_guest_that_renews_and_does_not_ack_is(make_host: MakeHost) -> None:
    host = make_host(lease_ns=SHORT_NS)
    guest = host.guest()
    guest.register(A)
    change = host.change(A)
    guest.hear_recall()
    while not change.done():
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # when it is over
            guest.renew()
        time.sleep(0.02)
    assert change.result() < 2 * SHORT_NS
    assert guest.hear(Evicted).session == guest.session


@pytest.mark.expected_logs(DROPPED + "(does not read|its lease)")
def test_a_guest_that_does_not_read_blocks_nobody(make_host: MakeHost) -> None:
    """It registers and never looks: its buffers fill, it is dropped, and is waited for until its lease is over."""
    host = make_host(lease_ns=2 * SECOND_NS, unsent_bytes=4096)
    deaf, good = host.guest("prompt", name="deaf"), host.guest(name="good")
    good.ack_everything()
    deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    longest_ns, changes = 0, 0
    while host.daemon.server.statistics().dropped == 0:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            deaf.say(Register(deaf.session, 1, (A, B)))
        good.say(Register(good.session, 1, (A,)))
        longest_ns = max(longest_ns, host.wait_for_change(A), host.wait_for_change(B))
        changes += 2
        assert changes < 100_000
    assert changes > 100
    assert longest_ns < SECOND_NS
    assert len(good.recalls) > 10


@pytest.mark.expected_logs(DROPPED + "does not read", DROPPED + "its lease")
def test_a_strict_guest_that_does_not_read_delays_until_its_lease_is_over(make_host: MakeHost) -> None:
    host = make_host(lease_ns=SECOND_NS, unsent_bytes=4096)
    deaf = host.guest()
    fill = (Register(deaf.session, 1, ()),) * 100
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        deaf.say(Register(deaf.session, 1, (A, B)))
        while host.daemon.server.statistics().dropped == 0:
            deaf.say(*fill)  # each is confirmed
    until(lambda: host.daemon.server.statistics().dropped == 1)
    assert host.daemon.leasing.statistics().lost == 1
    assert host.wait_for_change(A) < 2 * SECOND_NS
    assert host.daemon.leasing.statistics().evictions == 1
    assert host.wait_for_change(B) < SHORT_NS


# --- guests that go ------------------------------------------------------------------------------------------------


def test_a_guest_that_says_goodbye_is_not_waited_for(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    change = host.change(A)
    guest.hear_recall()
    guest.goodbye()
    change.result(20)


@pytest.mark.expected_logs(DROPPED + "hung up without a goodbye")
def test_the_end_of_its_connection_alone_is_waited_for_until_the_end_of_its_lease(make_host: MakeHost) -> None:
    host = make_host(lease_ns=SECOND_NS)
    joined_ns = time.monotonic_ns()
    guest = host.guest()
    guest.register(A)
    guest.vanish()
    until(lambda: host.daemon.leasing.statistics().lost == 1)
    host.wait_for_change(A)
    assert time.monotonic_ns() - joined_ns >= SECOND_NS
    assert host.daemon.leasing.statistics().evictions == 1


@pytest.mark.expected_logs(DROPPED + "hung up without a goodbye")
def test_or_until_it_comes_back(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    guest.vanish()
    until(lambda: host.daemon.leasing.statistics().lost == 1)
    change = host.change(A)
    until(lambda: host.daemon.leasing.statistics().waiting == 1)
    host.guest()
    host.settle()
    assert not change.done()
    host.guest(former=guest.session)
    change.result(20)


def test_goodbye_may_come_from_who_has_a_copy_of_the_socket(make_host: MakeHost) -> None:
    """A keeper cleans up after its agent was killed."""
    host = make_host()
    guest = host.guest()
    guest.register(A)
    keeper = guest.sock.dup()
    guest.sock.close()
    change = host.change(A)
    until(lambda: host.daemon.leasing.statistics().waiting == 1)
    keeper.send(encode(Goodbye()))
    change.result(20)
    keeper.close()


@pytest.mark.parametrize("says_goodbye", [True, False])
@pytest.mark.expected_logs(DROPPED + "hung up without a goodbye")
def test_a_goodbye_counts_also_if_the_end_is_noticed_by_sending(make_host: MakeHost, says_goodbye: bool) -> None:
    """The negative control: who did not say goodbye is waited for."""
    host = make_host()
    guest = host.guest()
    guest.register(A)
    with HeldLoop(host):
        (guest.goodbye if says_goodbye else guest.vanish)()
        change = host.change(A)
        if says_goodbye:
            change.result(20)
        else:
            until(lambda: host.daemon.leasing.statistics().lost == 1)
            assert not change.done()


# --- the origin ----------------------------------------------------------------------------------------------------


class HeldLoop:
    """The server's loop, stopped before it looks at its sockets again: what is sent to it meanwhile is not read."""

    def __init__(self, host: Host) -> None:
        self._selector: Any = host.daemon.server._selector
        self._select = self._selector.select
        self._held, self._go_on = threading.Event(), threading.Event()
        self._host = host

    def _wait(self, timeout: float | None = None) -> Any:
        self._held.set()
        self._go_on.wait(20)
        return self._select(0)

    def __enter__(self) -> None:
        self._selector.select = self._wait
        self._host.daemon.server.evict_due()
        with contextlib.suppress(OSError):
            os.eventfd_write(self._host.daemon.server._wakeup, 1)
        assert self._held.wait(20)

    def __exit__(self, *_: object) -> None:
        self._selector.select = self._select
        self._go_on.set()


@pytest.mark.parametrize("known", [True, False])
def test_a_release_that_lies_in_the_socket_of_the_origin_is_read_in_time(make_host: MakeHost, known: bool) -> None:
    """`known` or not is the negative control: an unknown origin is recalled and waited for like everybody."""
    host = make_host()
    guest = host.guest()
    guest.register(A, B)
    if known:
        assert host.origins.introduce(guest.session, threading.get_native_id())
    with HeldLoop(host):
        guest.release(A)
        change = host.change(A, request=request_of(threading.get_native_id()))
        if known:
            change.result(20)
            assert guest.hears_nothing()
        else:
            assert guest.hear_recall().keys == (A,)
    if not known:
        guest.ack(1)
        change.result(20)


def test_an_origin_that_still_is_a_sharer_is_told_and_waited_for(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A, B)
    host.origins.introduce(guest.session, threading.get_native_id())
    guest.release(A)
    change = host.change(A, B, request=request_of(threading.get_native_id()))
    assert guest.hear_recall().keys == (B,)
    assert not change.done()
    guest.ack(1)
    change.result(20)


@pytest.mark.expected_logs(DROPPED + "hung up in the middle of a frame")
def test_an_origin_that_goes_while_it_is_read(make_host: MakeHost) -> None:
    host = make_host(lease_ns=SECOND_NS)
    guest = host.guest()
    guest.register(A, B)
    host.origins.introduce(guest.session, threading.get_native_id())
    with HeldLoop(host):
        guest.sock.sendall(encode(Register(guest.session, 9, (C,)))[:-1])
        guest.sock.shutdown(socket.SHUT_RDWR)
        host.wait_for_change(A, request=request_of(threading.get_native_id()))
    assert host.daemon.leasing.statistics().evictions == 1


def test_origins_are_processes_and_only_of_guests_that_are_here() -> None:
    here = {7, 8}
    process_of = {101: 100, 102: 100, 201: 200, 100: 100}
    asked: list[int] = []

    def look(thread: int) -> int | None:
        asked.append(thread)
        return process_of.get(thread)

    origins = Origins(here.__contains__, process_of=look)
    assert origins.session_of(101) is None
    assert asked == []  # nobody has introduced himself
    assert not origins.introduce(9, 101)
    assert origins.introduce(7, 101)
    assert [origins.session_of(thread) for thread in (100, 101, 102, 201, 999)] == [7, 7, 7, None, None]
    asked.clear()
    assert [origins.session_of(thread) for thread in (101, 201)] == [7, None]
    assert asked == []
    assert origins.introduce(8, 201)
    assert [origins.session_of(thread) for thread in (102, 201)] == [7, 8]
    here.remove(7)
    assert origins.introduce(8, 201)  # a process has one session, and a session that is over has none
    assert [origins.session_of(thread) for thread in (102, 201)] == [None, 8]
    origins.check()
    assert origins.statistics() == (1, 2)


def test_the_process_of_a_thread() -> None:
    threads: list[int] = []
    thread = threading.Thread(target=lambda: threads.append(process_of_thread(threading.get_native_id()) or 0))
    thread.start()
    thread.join()
    assert threads == [os.getpid()]
    assert process_of_thread(0) is None
    assert process_of_thread(2**31) is None


# --- waits that end early ------------------------------------------------------------------------------------------


def interrupt(request: Request) -> None:
    """What the session does when the kernel says so."""
    until(lambda: request.on_interrupt is not None)
    request.interrupted = True
    assert request.on_interrupt is not None
    request.on_interrupt()


@pytest.mark.parametrize("killed_at_once", [True, False])
def test_a_caller_that_is_killed_gets_eintr(make_host: MakeHost, killed_at_once: bool) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    request = request_of(4711)
    change = host.change(A, request=request)
    guest.hear_recall()
    if killed_at_once:
        host.dying.add(request.pid)
    interrupt(request)
    if not killed_at_once:  # of the second signal the kernel does not tell
        host.settle()
        assert not change.done()
        host.dying.add(request.pid)
    with pytest.raises(InterruptedError) as caught:
        change.result(20)
    assert caught.value.errno == errno.EINTR
    assert host.daemon.leasing.statistics().waiting == 0
    following = host.change(A)  # still owed
    until(lambda: host.daemon.leasing.statistics().waiting == 1)
    guest.ack(1)
    following.result(20)


def test_a_caller_that_gets_another_signal_waits_on(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    request = request_of(4711)
    change = host.change(A, request=request)
    guest.hear_recall()
    interrupt(request)
    host.settle()
    assert not change.done()
    guest.ack(1)
    change.result(20)


def test_a_caller_that_was_killed_before_the_wait(make_host: MakeHost) -> None:
    host = make_host()
    host.guest().register(A)
    request = request_of(4711)
    request.interrupted = True
    host.dying.add(4711)
    with pytest.raises(InterruptedError):
        host.wait_for_change(A, request=request)
    host.wait_for_change(B, request=request)  # the negative control: it need not wait, so there is nothing to end


def test_who_is_dying() -> None:
    """The others are asked by a test with a mount: a process that dies and waits is not made without one."""
    assert not is_dying(os.getpid())
    assert not is_dying(0)
    assert not is_dying(2**31)
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        until(lambda: "T (stopped)" in Path(f"/proc/{sleeper.pid}/status").read_text())
        sleeper.send_signal(signal.SIGWINCH)
        assert not is_dying(sleeper.pid)
        sleeper.send_signal(signal.SIGTERM)  # is pending as long as it is stopped
        assert is_dying(sleeper.pid)
        sleeper.send_signal(signal.SIGCONT)


def test_a_daemon_that_gives_up_its_waits(make_host: MakeHost) -> None:
    host = make_host()
    host.guest().register(A, B)
    change = host.change(A)
    until(lambda: host.daemon.leasing.statistics().waiting == 1)
    host.recalls.give_up()
    with pytest.raises(InterruptedError):
        change.result(20)
    with pytest.raises(InterruptedError):
        host.wait_for_change(B)
    host.wait_for_change(C)


@pytest.mark.expected_logs("the control channel failed")
def test_a_wait_ends_also_if_the_loop_has_failed(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host(lease_ns=SECOND_NS)
    guest = host.guest()
    guest.register(A, B)
    with monkeypatch.context() as patch:
        patch.setattr(host.daemon.server, "_serve_link", lambda *_: 1 / 0)
        guest.renew()
        assert guest.next() is None
    host.wait_for_change(A)
    assert host.daemon.leasing.statistics().evictions == 1
    host.wait_for_change(B)


# --- everything at once --------------------------------------------------------------------------------------------


def test_many_changes_and_guests_that_come_and_go(make_host: MakeHost) -> None:
    host = make_host()
    keys = [GrantKey(number) for number in range(20)]
    stop = threading.Event()
    guests = [host.guest() for _ in range(3)]
    for guest in guests:
        guest.ack_everything()

    def register(guest: ScriptedGuest, seed: int) -> None:
        chance = random.Random(seed)
        for serial in range(1, 400):
            guest.say(Register(guest.session, serial, tuple(chance.sample(keys, 5))))
            if serial % 7 == 0:
                guest.release(*chance.sample(keys, 5))

    def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            with ScriptedGuest(host.daemon.path, chance.choice(["strict", "prompt"])) as guest:
                guest.ack_everything()
                guest.say(Register(guest.session, 1, tuple(keys)))

    def change(seed: int) -> int:
        chance = random.Random(seed)
        return max(host.wait_for_change(*chance.sample(keys, chance.randrange(1, 5))) for _ in range(300))

    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(register, guest, seed) for seed, guest in enumerate(guests)]
        others += [pool.submit(come_and_go, seed) for seed in (10, 11)]
        try:
            longest_ns = max(pool.map(change, range(20, 24)))
        finally:
            stop.set()
        for other in others:
            other.result(20)
    assert longest_ns < LONG_NS
    assert host.recalls.statistics().waits > 10
    assert host.recalls.statistics().waiting == 0
    host.recalls.check()
    assert host.daemon.leasing.statistics().evictions == 0
    assert all(guest.recalls for guest in guests)
    until(lambda: host.daemon.leasing.statistics().unacked == 0)


def test_invalidate_waits_until_the_guests_have_forgotten(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(invalidate, host.daemon.root, host.daemon.name)
        assert guest.hear_recall().keys == ()
        host.settle()
        assert not asked.done()
        guest.ack(1)
        assert asked.result(20) == 2


def test_the_status_tells_of_grants(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest(name="holder")
    guest.ack_everything()
    guest.say(Register(guest.session, 1, (A, B, C)))
    until(lambda: host.daemon.leasing.statistics().registrations == 3)
    host.wait_for_change(A)
    (report,) = fetch_status(host.daemon.root, host.daemon.name)["guests"]
    assert (report["keys"], report["recalls"], report["unacked"]) == (2, 1, 0)
    assert 0 < report["lease_left_ns"] <= LONG_NS


def test_a_flood_of_registrations_is_bounded(make_host: MakeHost) -> None:
    """Whoever may connect can fill its own books up to the limit, and the others' changes go on."""
    host = make_host()
    flood, good = host.guest("prompt"), host.guest()
    good.ack_everything()
    stop = threading.Event()

    def pour() -> None:
        serial = 0
        while not stop.is_set():
            serial += 1
            with contextlib.suppress(BlockingIOError, TimeoutError):
                flood.say(Register(flood.session, serial, tuple(map(GrantKey, range(100, 4196)))))
            flood.hears_nothing()

    pourer = threading.Thread(target=pour)
    pourer.start()
    try:
        for _ in range(50):
            good.say(Register(good.session, 1, (A,)))
            assert host.wait_for_change(A) < SECOND_NS
    finally:
        stop.set()
        pourer.join()
    assert host.daemon.leasing.statistics().registrations <= 4096 + 1


# --- changes that somebody else has made ---------------------------------------------------------------------------


def test_an_announcement_tells_everybody_and_waits_for_nobody(make_host: MakeHost) -> None:
    host = make_host()
    strict, prompt = host.guest(), host.guest("prompt")
    strict.register(A)
    prompt.register(A, B)
    host.recalls.announce((A, B, C))
    assert strict.hear_recall().keys == (A,)
    assert prompt.hear_recall().keys == (A, B)
    assert host.recalls.statistics().waits == 0


def test_a_later_change_waits_for_the_ack_of_an_announcement(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    host.recalls.announce((A,))
    serial = guest.hear_recall().serial
    change = host.change(A)
    host.settle()
    assert not change.done()
    guest.ack(serial)
    change.result(20)


@pytest.mark.parametrize("keys", [None, tuple(map(GrantKey, range(MAX_KEYS_PER_MESSAGE + 1)))], ids=["all", "too many"])
def test_more_keys_than_a_message_may_name_are_all_keys(make_host: MakeHost, keys: tuple[GrantKey, ...] | None) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    host.recalls.announce(keys)
    assert guest.hear_recall().keys == ()


def test_an_announcement_of_what_nobody_has_takes_no_lock(make_host: MakeHost) -> None:
    host = make_host()
    guest = host.guest()
    guest.register(A)
    with host.daemon.server._control_lock:
        host.recalls.announce((B, C))
    host.recalls.announce((A,))  # the negative control
    guest.hear_recall()

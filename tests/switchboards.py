"""A switchboard on a bench: its time, its peers and its journal are the test's, and what it sends is there to be read."""

import errno
import itertools
from collections.abc import Callable, Mapping

from coherency.daemon.actions import Drop, Note, Send
from coherency.daemon.leasing import Leasing
from coherency.daemon.ledger import Ledger
from coherency.daemon.peer_states import Credentials, PeerId
from coherency.daemon.switchboard import Limits, Switchboard
from coherency.ids import Epoch, GrantKey
from coherency.leases import MAX_KEYS_PER_GUEST
from coherency.protocol import (
    Ack,
    Confirm,
    Hello,
    Message,
    Refusal,
    RefusalCode,
    Register,
    Renew,
    Renewed,
    Welcome,
    encode,
)
from coherency.protocol_fields import ReportValue
from coherency.protocol_stream import Decoder
from tests.control_messages import REPORT

OWN_UID = 1000
ROOT, OWNER, STRANGER = Credentials(10, 0), Credentials(11, OWN_UID), Credentials(12, 1001)
HELLO = Hello(name="g", pid=1, mode="access", former=0)
WELCOME = Welcome(0, 5, 9 * 10**9, 7, 8, 4096, 10**9, "/share", "/export")
LIMITS = Limits(peers=8, opening_ns=1000, frame_ns=500, statistics_ns=100)
LEASE_NS = 10_000
SLOT_COUNT = 64
FIRST_SESSION = 0x5001
"""Of the first guest; the others count up."""


class Notebook:
    """A journal that survives nothing: which sessions there are, and what was said of former ones."""

    def __init__(self) -> None:
        self.sessions: dict[int, int] = {}
        self.accounted: list[tuple[int, int]] = []
        self.full = False

    def add(self, session: int, uid: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "no space left")
        self.sessions[session] = uid

    def discard(self, session: int) -> None:
        del self.sessions[session]

    def account(self, session: int, uid: int) -> None:
        self.accounted.append((session, uid))


def make_leasing(
    *,
    lease_ns: int = LEASE_NS,
    slot_count: int = SLOT_COUNT,
    max_keys: int = MAX_KEYS_PER_GUEST,
    epoch: Callable[[], Epoch] = lambda: Epoch(1),
    journal: Notebook | None = None,
    new_session: Callable[[], int] | None = None,
) -> Leasing:
    """Without a guest; sessions count up."""
    ledger = Ledger(lease_ns=lease_ns, slot_count=slot_count, max_keys=max_keys)
    return Leasing(
        ledger,
        lease_ns=lease_ns,
        epoch=epoch,
        new_session=new_session or itertools.count(FIRST_SESSION).__next__,
        journal=journal or Notebook(),
    )


class Bench:
    """A switchboard whose sent frames are decoded, peer by peer, and whose drops are kept."""

    def __init__(self, limits: Limits = LIMITS, *, max_keys: int = MAX_KEYS_PER_GUEST) -> None:
        self.now_ns = 0
        self.credentials = STRANGER
        self.journal = Notebook()
        self.leasing = make_leasing(epoch=lambda: Epoch(self.epoch), journal=self.journal, max_keys=max_keys)
        self.report: Mapping[str, ReportValue] = REPORT
        self.epoch = 1
        self.board = Switchboard(
            welcome=WELCOME,
            status=lambda: self.report,
            invalidate=self._invalidate,
            leasing=self.leasing,
            own_uid=OWN_UID,
            limits=limits,
        )
        self.notes: list[Note] = []
        self.got: dict[PeerId, list[Message]] = {}
        self.dropped: dict[PeerId, Drop] = {}

    def _invalidate(self) -> Epoch:
        if self.epoch == 0:
            raise OSError("the table is gone")
        self.epoch += 1
        return Epoch(self.epoch)

    def open(self, credentials: Credentials | None = None) -> PeerId:
        peer = self.board.opened(credentials or self.credentials, self.now_ns)
        self.got[peer] = []
        self.act()
        return peer

    def guest(self, name: str = "g", mode: str = "access") -> PeerId:
        peer = self.open()
        self.send(peer, Hello(name=name, pid=1, mode=mode, former=0))
        assert [type(message) for message in self.take(peer)] == [Welcome]
        return peer

    def send(self, peer: PeerId, *messages: Message) -> None:
        self.raw(peer, b"".join(map(encode, messages)))

    def raw(self, peer: PeerId, data: bytes) -> None:
        self.board.received(peer, data, self.now_ns)
        self.act()

    def hang_up(self, peer: PeerId) -> None:
        self.raw(peer, b"")

    def pass_time(self, to_ns: int) -> None:
        """Let the time pass as the server does: from deadline to deadline."""
        while (due := self.board.next_deadline_ns) is not None and due <= to_ns:
            self.now_ns = due
            self.board.tick(due)
            self.act()
        self.now_ns = to_ns
        self.board.tick(to_ns)
        self.act()

    def act(self) -> None:
        for action in self.board.take_actions():
            if isinstance(action, Note):
                self.notes.append(action)
                continue
            assert action.peer not in self.dropped, "nothing is sent to who was dropped"
            data = action.frame if isinstance(action, Send) else action.farewell
            self.got[action.peer] += Decoder().feed(data)
            if isinstance(action, Drop):
                self.dropped[action.peer] = action
        self.board.check()

    def take(self, peer: PeerId) -> list[Message]:
        messages, self.got[peer] = self.got[peer], []
        return messages

    def refusal(self, peer: PeerId) -> RefusalCode:
        """The code with which this peer was dropped."""
        (message,) = self.take(peer)
        assert isinstance(message, Refusal)
        assert message.text == self.dropped[peer].reason
        return RefusalCode(message.code)


class Guest:
    """A guest of the bench that does what the test says."""

    def __init__(
        self, bench: Bench, mode: str = "strict", *, former: int = 0, uid: int = STRANGER.uid, line: str = "socket", name: str = "g"
    ) -> None:
        self.bench = bench
        self.peer = bench.open(STRANGER._replace(uid=uid))
        bench.send(self.peer, Hello(name, 1, mode, former, line))
        (welcome,) = self.take()
        assert isinstance(welcome, Welcome)
        self.session = welcome.session
        self.serial = 0

    def take(self) -> list[Message]:
        return self.bench.take(self.peer)

    def say(self, *messages: Message) -> list[Message]:
        """Say something; returns what was heard since."""
        self.bench.send(self.peer, *messages)
        return self.take()

    def register(self, *keys: GrantKey) -> None:
        self.serial += 1
        assert self.say(Register(self.session, self.serial, keys)) == [Confirm(self.session, self.serial, self.bench.epoch)]

    def ack(self, serial: int) -> None:
        assert self.say(Ack(self.session, serial)) == []

    def renew(self) -> bool:
        self.serial += 1
        heard = self.say(Renew(self.session, self.serial))
        assert heard in ([], [Renewed(self.session, self.serial)])
        return bool(heard)

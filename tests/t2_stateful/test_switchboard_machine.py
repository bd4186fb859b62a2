"""Good guests and a good operator among peers that do anything at all, at any time: they must not notice.

The model is the promise: the good ones are never dropped, every status is answered in time and with counters that are not
older than the question; the good strict guest is told exactly what it shares, no change goes on while that guest owes what
the change needs, and none waits longer than one lease, whatever the others do. The switchboard's own invariants hold after
every step.
"""

from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coherency.daemon.actions import Drop, Note, Send
from coherency.daemon.leasing import Leasing, OfGrants
from coherency.daemon.ledger import Round
from coherency.daemon.peer_states import Credentials, Peer, PeerId
from coherency.daemon.switchboard import Limits, Switchboard
from coherency.ids import Epoch, GrantKey
from coherency.protocol import (
    LINES,
    Ack,
    Confirm,
    Goodbye,
    GuestReport,
    Hello,
    Message,
    Recall,
    Register,
    Release,
    Renew,
    Renewed,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from coherency.protocol_stream import Decoder
from tests.control_messages import REPORT, frame, messages
from tests.switchboards import make_leasing

LIMITS = Limits(peers=7, opening_ns=1000, frame_ns=400, statistics_ns=100)
OPERATOR_PATIENCE_NS = 2 * LIMITS.statistics_ns
BAD = st.integers(0, 3)
SLOT_COUNT, MAX_KEYS, LEASE_NS = 4, 6, 600
KEYS = [GrantKey(number) for number in range(2 * SLOT_COUNT)]
SOME_KEYS = st.lists(st.sampled_from(KEYS), max_size=4, unique=True).map(tuple)
ANY_KEYS = st.lists(st.sampled_from([*KEYS, GrantKey(2 * SLOT_COUNT)]), max_size=MAX_KEYS + 1).map(tuple)


class Change:
    """A recall, and what of the good guest's must be acked before it may go on."""

    def __init__(self, round_: Round, began_ns: int, serial: int) -> None:
        self.round, self.began_ns, self.serial = round_, began_ns, serial


class Hostility(RuleBasedStateMachine):
    """Peers 1, 2 and 3 are good; the others are the test's to abuse."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.hits = 0
        self.serials_owed: list[int] = []
        self.answers_under_way: list[bytes] = []
        self.asked: tuple[int, int] | None = None  # when, and the hits at that moment
        self.answered_at_ns = 0
        self.bad: dict[int, PeerId] = {}
        self.dropped: set[PeerId] = set()
        self.decoders: dict[PeerId, Decoder] = {}
        self.shared: set[GrantKey] = set()
        self.told: list[Recall] = []  # what the strict guest has heard
        self.acked = self.renewals = 0
        self.renewed_at_ns = 0
        self.last_recall_of: dict[GrantKey, int] = {}
        self.changes: list[Change] = []
        self.sessions: dict[PeerId, int] = {}
        self.board = Switchboard(
            welcome=Welcome(0, 5, 9 * 10**9, 1, 2, 4096, 10**9, "/share", "/export"),
            status=lambda: REPORT,
            invalidate=lambda: Epoch(1),
            leasing=make_leasing(lease_ns=LEASE_NS, slot_count=SLOT_COUNT, max_keys=MAX_KEYS),
            own_uid=0,
            limits=LIMITS,
        )

    @initialize()
    def good_peers_come(self) -> None:
        self.guest, self.operator, self.sharer = self.open(), self.open(), self.open()
        self.feed(self.guest, encode(Hello(name="good", pid=1, mode="access", former=0)))
        self.feed(self.sharer, encode(Hello(name="strict", pid=1, mode="strict", former=0)))
        self.ask()
        for which in range(2):  # in the middle of life: few examples would get there
            self.come(which)
            self.become_a_guest(which, "bad", "strict", 3)
            self.speak_of_grants(which, tuple(KEYS[: 2 + which]), 1, 0, foreign=False)

    def open(self) -> PeerId:
        peer = self.board.opened(Credentials(1, 1000), self.now_ns)
        self.decoders[peer] = Decoder()
        self.act()
        return peer

    def feed(self, peer: PeerId, data: bytes) -> None:
        self.board.received(peer, data, self.now_ns)
        self.act()

    def act(self) -> None:
        for action in self.board.take_actions():
            if isinstance(action, Note):
                continue
            assert action.peer not in self.dropped
            data = action.frame if isinstance(action, Send) else action.farewell
            for message in self.decoders[action.peer].feed(data):
                self.heard(action.peer, message)
            if isinstance(action, Drop):
                self.dropped.add(action.peer)
                assert action.error is None

    def heard(self, peer: PeerId, message: Message) -> None:
        if isinstance(message, Welcome):
            self.sessions[peer] = message.session
        if peer == self.sharer:
            if isinstance(message, Recall):
                self.told.append(message)
            elif isinstance(message, Renewed):
                assert message.serial == self.renewals
        elif peer == self.guest and isinstance(message, StatisticsRequest):
            self.serials_owed.append(message.serial)
        elif peer == self.operator:
            assert self.asked is not None
            asked_at_ns, hits = self.asked
            if isinstance(message, GuestReport) and message.name == "good" and message.answered:
                assert message.hits >= hits, "an answer that is older than the question"
            elif isinstance(message, StatusReply):
                assert self.now_ns - asked_at_ns <= OPERATOR_PATIENCE_NS
                self.asked, self.answered_at_ns = None, self.now_ns

    # --- the good ones -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.asked is None)
    @rule()
    def ask(self) -> None:
        self.asked = (self.now_ns, self.hits)
        self.feed(self.operator, encode(StatusRequest()))

    @precondition(lambda self: self.serials_owed)
    @rule()
    def answer(self) -> None:
        self.answers_under_way.append(encode(Statistics(self.serials_owed.pop(0), self.hits, 0, 0, 0, 0)))

    @precondition(lambda self: self.answers_under_way)
    @rule(cut=st.integers(1, 15))
    def answer_arrives(self, cut: int) -> None:
        answer = self.answers_under_way.pop(0)
        self.feed(self.guest, answer[:cut])
        self.feed(self.guest, answer[cut:])

    @rule(more=st.integers(1, 5))
    def hit(self, more: int) -> None:
        self.hits += more

    # --- the good strict guest, and changes --------------------------------------------------------------------

    @property
    def session(self) -> int:
        return self.sessions[self.sharer]

    @rule(keys=SOME_KEYS)
    def register(self, keys: tuple[GrantKey, ...]) -> None:
        if len(self.shared | set(keys)) <= MAX_KEYS:
            self.shared |= set(keys)
            self.feed(self.sharer, encode(Register(self.session, 1, keys)))

    @rule(keys=SOME_KEYS)
    def release(self, keys: tuple[GrantKey, ...]) -> None:
        self.shared -= set(keys)
        self.feed(self.sharer, encode(Release(self.session, keys)))

    @rule(behind=st.integers(0, 2))
    def ack(self, behind: int) -> None:
        if self.acked < len(self.told) - behind:
            self.acked = len(self.told) - behind
            self.feed(self.sharer, encode(Ack(self.session, self.acked)))

    @rule()
    def renew(self) -> None:
        self.renewals += 1
        self.renewed_at_ns = self.now_ns
        self.feed(self.sharer, encode(Renew(self.session, self.renewals)))

    @rule(keys=SOME_KEYS)
    def change(self, keys: tuple[GrantKey, ...]) -> None:
        heard = len(self.told)
        round_ = self.board.recall(keys, lambda: None, self.now_ns)
        self.act()
        expected = self.shared & set(keys)
        self.shared -= expected
        assert [(recall.serial, set(recall.keys)) for recall in self.told[heard:]] == (
            [(heard + 1, expected)] if expected else []
        )
        self.last_recall_of |= dict.fromkeys(expected, heard + 1)
        self.changes.append(Change(round_, self.now_ns, max((self.last_recall_of.get(key, 0) for key in keys), default=0)))

    # --- the others --------------------------------------------------------------------------------------------

    @rule(which=BAD)
    def come(self, which: int) -> None:
        if which not in self.bad or self.bad[which] in self.dropped:
            self.bad[which] = self.open()

    @precondition(lambda self: self.bad)
    @rule(
        which=BAD, name=st.sampled_from(["bad", "good too"]), mode=st.sampled_from(["none", "prompt", "strict"]), of=BAD,
        line=st.sampled_from(LINES),
    )  # fmt: skip
    def become_a_guest(self, which: int, name: str, mode: str, of: int, line: str = "socket") -> None:
        if which in self.bad:
            former = self.sessions.get(self.bad.get(of, PeerId(0)), 0)
            self.feed(self.bad[which], encode(Hello(name=name, pid=1, mode=mode, former=former, line=line)))

    @precondition(lambda self: self.bad)
    @rule(which=BAD, mode=st.sampled_from(["none", "strict"]), kept=st.integers(0, 15), keys=SOME_KEYS, goodbye=st.booleans())
    def one_agent_after_the_other(self, which: int, mode: str, kept: int, keys: tuple[GrantKey, ...], goodbye: bool) -> None:
        """On a serial line, each cut off in what it says."""
        if which in self.bad and self.bad[which] not in self.dropped:
            hello = Hello(name="bad", pid=1, mode=mode, former=0, line="serial")
            self.feed(self.bad[which], encode(hello))
            session = self.sessions.get(self.bad[which], 0)
            last = encode(Goodbye()) if goodbye else encode(StatusRequest())[:kept]
            said = encode(Register(session, 1, keys)) if mode == "strict" else b""
            self.feed(self.bad[which], said + last)
            self.feed(self.bad[which], encode(hello))

    @precondition(lambda self: self.bad)
    @rule(which=BAD, keys=ANY_KEYS, serial=st.integers(0, 3), what=st.integers(0, 3), foreign=st.booleans())
    def speak_of_grants(self, which: int, keys: tuple[GrantKey, ...], serial: int, what: int, foreign: bool) -> None:
        if which in self.bad:
            session = self.session if foreign else self.sessions.get(self.bad[which], 0)
            message: Message = (
                Register(session, serial, keys), Release(session, keys), Ack(session, serial), Renew(session, serial)
            )[what]  # fmt: skip
            self.feed(self.bad[which], encode(message))

    @precondition(lambda self: self.bad)
    @rule(which=BAD)
    def ask_too(self, which: int) -> None:
        if which in self.bad:
            self.feed(self.bad[which], encode(StatusRequest()))

    @precondition(lambda self: self.bad)
    @rule(which=BAD, message=messages() | st.builds(Statistics, *[st.integers(0, 3)] * 6))
    def say(self, which: int, message: Message) -> None:
        if which in self.bad:
            self.feed(self.bad[which], encode(message))

    @precondition(lambda self: self.bad)
    @rule(which=BAD, data=st.binary(max_size=20) | st.binary(max_size=20).map(frame))
    def babble(self, which: int, data: bytes) -> None:
        if which in self.bad:
            self.feed(self.bad[which], data)

    @precondition(lambda self: self.bad)
    @rule(which=BAD, kept=st.integers(1, 15))
    def begin_a_frame(self, which: int, kept: int) -> None:
        if which in self.bad:
            self.feed(self.bad[which], encode(StatusRequest())[:kept])

    @precondition(lambda self: self.bad)
    @rule(which=BAD, broken=st.booleans())
    def go(self, which: int, broken: bool) -> None:
        if which not in self.bad:
            return
        if broken:
            self.board.lost(self.bad[which], "does not read", self.now_ns)
            self.act()
        else:
            self.feed(self.bad[which], b"")

    # --- the time ----------------------------------------------------------------------------------------------

    @rule(by_ns=st.sampled_from([1, 50, 100, 399, 1000]))
    def pass_time(self, by_ns: int) -> None:
        end_ns = self.now_ns + by_ns
        while True:
            due = self.board.next_deadline_ns
            must_renew_at_ns = self.renewed_at_ns + LEASE_NS // 2
            steps = [at_ns for at_ns in (due, self.operator_must_ask_at_ns(), must_renew_at_ns) if at_ns is not None]
            self.now_ns = max(self.now_ns, min([end_ns, *steps]))
            must_ask_at_ns = self.operator_must_ask_at_ns()
            if must_ask_at_ns is not None and self.now_ns >= must_ask_at_ns:
                self.ask()  # a good operator keeps its own deadline
            if self.now_ns >= must_renew_at_ns:  # so does a good guest
                self.ack(0)
                self.renew()
            self.board.tick(self.now_ns)
            self.act()
            if self.now_ns == end_ns:
                return

    def operator_must_ask_at_ns(self) -> int | None:
        return self.answered_at_ns + LIMITS.opening_ns // 2 if self.asked is None else None

    @invariant()
    def the_good_ones_are_there(self) -> None:
        self.board.check()
        assert not {1, 2, 3} & self.dropped
        if self.asked is not None:
            assert self.now_ns - self.asked[0] <= OPERATOR_PATIENCE_NS

    @invariant()
    def a_guest_owes_one_answer_at_most(self) -> None:
        assert len(self.serials_owed) + len(self.answers_under_way) <= 1


    @invariant()
    def changes_wait_as_they_must(self) -> None:
        for change in self.changes:
            assert change.round.pending or change.serial <= self.acked, "a change went on too early"
            assert not change.round.pending or self.now_ns < change.began_ns + LEASE_NS, "a change waits too long"
        self.changes = [change for change in self.changes if change.round.pending]


TestHostility = Hostility.TestCase
TestHostility.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# --- negative controls ---------------------------------------------------------------------------------------------


def once_more(leasing: Leasing, now_ns: int) -> list[Any]:
    """Whose lease is over gets another."""
    while (session := leasing._ledger._leases.pop_due(now_ns)) is not None:
        leasing._ledger._leases.set(session, now_ns + LEASE_NS)
    return []


def forgives(leasing: Leasing, peer: Peer, message: OfGrants, now_ns: int) -> Confirm | Renewed | None:
    """A Renew of a debtor is taken for its ack."""
    if isinstance(message, Renew) and leasing.has(peer.session):
        recalls = leasing._ledger.books(peer.session).recalls
        if recalls:
            leasing._ledger.ack(peer.session, recalls)
    return ANSWER(leasing, peer, message, now_ns)


ANSWER = Leasing.answer


@pytest.mark.parametrize(
    ("method", "broken", "complaint"),
    [
        ("evict_due", once_more, "a change waits too long"),
        ("answer", forgives, "a change went on too early"),
    ],
)
def test_the_machine_catches(method: str, broken: Any, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leasing, method, broken)
    no_shrinking = settings(
        max_examples=500, stateful_step_count=40, deadline=None, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises(AssertionError, match=complaint):
        run_state_machine_as_test(Hostility, settings=no_shrinking)

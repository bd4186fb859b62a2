"""A good guest and a good operator among peers that do anything at all, at any time: they must not notice.

The model is the promise: the guest is never dropped, every status is answered in time and with counters that are not
older than the question, and the switchboard's own invariants hold after every step.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coherency.daemon.actions import Drop, Note, Send
from coherency.daemon.peer_states import Credentials, PeerId
from coherency.daemon.switchboard import Limits, Switchboard
from coherency.ids import Epoch
from coherency.protocol import (
    Decoder,
    GuestReport,
    Hello,
    Message,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from tests.control_messages import REPORT, frame, messages
from tests.switchboards import make_leasing

LIMITS = Limits(peers=6, opening_ns=1000, frame_ns=400, statistics_ns=100)
OPERATOR_PATIENCE_NS = 2 * LIMITS.statistics_ns
BAD = st.integers(0, 3)


class Hostility(RuleBasedStateMachine):
    """Peers 1 and 2 are good; the others are the test's to abuse."""

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
        self.board = Switchboard(
            welcome=Welcome(0, 5, 9 * 10**9, 1, 2, 4096, 10**9, "/share", "/export"),
            status=lambda: REPORT,
            invalidate=lambda: Epoch(1),
            leasing=make_leasing(),
            own_uid=0,
            limits=LIMITS,
        )

    @initialize()
    def good_peers_come(self) -> None:
        self.guest, self.operator = self.open(), self.open()
        self.feed(self.guest, encode(Hello(name="good", pid=1, mode="access", former=0)))
        self.ask()

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
        if peer == self.guest and isinstance(message, StatisticsRequest):
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

    # --- the others --------------------------------------------------------------------------------------------

    @rule(which=BAD)
    def come(self, which: int) -> None:
        if which not in self.bad or self.bad[which] in self.dropped:
            self.bad[which] = self.open()

    @precondition(lambda self: self.bad)
    @rule(which=BAD, name=st.sampled_from(["bad", "good too"]))
    def become_a_guest(self, which: int, name: str) -> None:
        if which in self.bad:
            self.feed(self.bad[which], encode(Hello(name=name, pid=1, mode="none", former=0)))

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
            steps = [at_ns for at_ns in (due, self.operator_must_ask_at_ns()) if at_ns is not None]
            self.now_ns = max(self.now_ns, min([end_ns, *steps]))
            must_ask_at_ns = self.operator_must_ask_at_ns()
            if must_ask_at_ns is not None and self.now_ns >= must_ask_at_ns:
                self.ask()  # a good operator keeps its own deadline
            self.board.tick(self.now_ns)
            self.act()
            if self.now_ns == end_ns:
                return

    def operator_must_ask_at_ns(self) -> int | None:
        return self.answered_at_ns + LIMITS.opening_ns // 2 if self.asked is None else None

    @invariant()
    def the_good_ones_are_there(self) -> None:
        self.board.check()
        assert not {1, 2} & self.dropped
        if self.asked is not None:
            assert self.now_ns - self.asked[0] <= OPERATOR_PATIENCE_NS

    @invariant()
    def a_guest_owes_one_answer_at_most(self) -> None:
        assert len(self.serials_owed) + len(self.answers_under_way) <= 1


TestHostility = Hostility.TestCase
TestHostility.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

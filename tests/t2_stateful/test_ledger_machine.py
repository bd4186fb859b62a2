"""The ledger against books that are kept in the slowest and plainest way: sets of (guest, key), and a list of recalls.

Guests come and go, are lost, break the rules; rounds overlap and are given up; leases end, noticed late or in time.
Below, ledgers that break one rule each, and must be caught; last, the one method that needs no lock, interrupted
everywhere.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coherency.daemon import ledger as ledger_module
from coherency.daemon.ledger import Ledger, Round
from coherency.errors import MessageError
from coherency.ids import GrantKey

LEASE_NS = 100
SLOT_COUNT = 3
MAX_KEYS = 3
KEYS = [GrantKey(n) for n in range(2 * SLOT_COUNT)]
BAD_KEYS = [-1, 2 * SLOT_COUNT]
PLACES = 4  # guests at one time; those at even places are strict

GUEST_ACTIONS = ["register"] * 4 + ["release", "ack", "ack", "renew", "renew", "lose", "leave", "come back"]
DAEMON_ACTIONS = ["recall"] * 4 + ["recall everything", "recall all of one", "abandon", "time passes", "time passes", "look away"]

some_keys = st.lists(st.sampled_from([*KEYS * 3, *BAD_KEYS]), max_size=4)


class Recall(NamedTuple):
    """One that is not acked.  `keys` is None if it was of everything."""

    guest: int
    serial: int
    keys: frozenset[int] | None
    strict: bool

    def is_about(self, key: int) -> bool:
        return self.keys is None or key in self.keys


@dataclass
class Expected:
    """A round, and what the plain books say of it."""

    round_: Round
    waits_for: set[tuple[int, int]]
    woken: list[None]
    was_pending: bool
    abandoned: bool = False


@dataclass
class Books:
    """The specification."""

    strict: dict[int, bool] = field(default_factory=dict)
    leases: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    sharers: set[tuple[int, int]] = field(default_factory=set)
    recalls: list[Recall] = field(default_factory=list)

    def keys_of(self, guest: int) -> set[int]:
        return {key for sharer, key in self.sharers if sharer == guest}

    def unacked(self, guest: int) -> list[Recall]:
        return [recall for recall in self.recalls if recall.guest == guest]

    def is_held(self, key: int) -> bool:
        return any(key == held for _, held in self.sharers) or any(
            recall.strict and recall.is_about(key) for recall in self.recalls
        )

    def recall(
        self, keys: set[int], *, everything: bool, only: int | None = None
    ) -> tuple[set[tuple[int, int, frozenset[int]]], set[tuple[int, int]]]:
        """What must be told, and which recalls must be waited for.  `only`: of this guest alone."""
        tell = set()
        waits_for = {
            (recall.guest, recall.serial)
            for recall in self.recalls
            if recall.strict and only in (None, recall.guest) and (everything or any(map(recall.is_about, keys)))
        }
        for guest in self.leases if only is None else [only]:
            recalled = self.keys_of(guest) & keys
            if recalled:
                self.sent[guest] += 1
                recall = Recall(guest, self.sent[guest], None if everything else frozenset(recalled), self.strict[guest])
                self.recalls.append(recall)
                self.sharers -= {(guest, key) for key in recalled}
                if self.strict[guest]:
                    waits_for.add((guest, recall.serial))
                if guest not in self.lost:
                    tell.add((guest, recall.serial, frozenset() if everything else frozenset(recalled)))
        return tell, waits_for

    def forget(self, guest: int) -> None:
        self.sharers = {(sharer, key) for sharer, key in self.sharers if sharer != guest}
        self.recalls = [recall for recall in self.recalls if recall.guest != guest]
        self.lost.discard(guest)
        del self.leases[guest]


class LedgerMachine(RuleBasedStateMachine):
    """A ledger and the plain books of the same events."""

    ledger_type: ClassVar[type[Ledger]] = Ledger
    looks_inside: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.ledger = self.ledger_type(lease_ns=LEASE_NS, slot_count=SLOT_COUNT, max_keys=MAX_KEYS)
        self.books = Books()
        self.now_ns = 0
        self.guests: list[int] = []
        self.expected: list[Expected] = []
        # Start in the middle of life: a machine that has to get there first explores little else.
        for place in range(PLACES):
            self.guests.append(0)
            self.guest_does("come back", place, [], 0)
            self.guest_does("register", place, KEYS[:2], 0)

    # Two rules with many actions, not many rules: Hypothesis switches rules off at random, and an interesting schedule
    # here needs almost all of them.

    @rule(what=st.sampled_from(GUEST_ACTIONS), place=st.integers(0, PLACES - 1), keys=some_keys, behind=st.integers(-1, 3))
    def guest_does(self, what: str, place: int, keys: list[int], behind: int) -> None:
        """What a guest does, or whoever speaks for one that has gone; `behind`: how many recalls an ack leaves out."""
        guest, books = self.guests[place], self.books
        here = guest in books.leases
        bad = bool(set(keys) & set(BAD_KEYS))
        match what:
            case "register":
                too_many = here and len(books.keys_of(guest) | set(keys)) > MAX_KEYS
                fault = not here or bad or too_many or guest in books.lost
                if self.accepted(lambda: self.ledger.register(guest, keys), unless=fault):
                    books.sharers |= {(guest, key) for key in keys}
            case "release":
                if self.accepted(lambda: self.ledger.release(guest, keys), unless=not here or bad):
                    books.sharers -= {(guest, key) for key in keys}
            case "ack":
                serial = books.sent[guest] - behind
                fault = not here or not 1 <= serial <= books.sent[guest]
                if self.accepted(lambda: self.ledger.ack(guest, serial), unless=fault):
                    books.recalls = [recall for recall in books.recalls if recall.guest != guest or recall.serial > serial]
            case "renew":
                renewed: list[bool] = []
                if self.accepted(lambda: renewed.append(self.ledger.renew(guest, self.now_ns)), unless=not here):
                    may = not books.unacked(guest) and guest not in books.lost
                    assert renewed == [may], "renewal: a lease that is not the guest's, or not one that is"
                    if may:
                        books.leases[guest] = self.now_ns + LEASE_NS
            case "lose":
                self.ledger.lose(guest)
                if here:
                    books.lost.add(guest)
            case "leave":
                self.ledger.leave(guest)
                if here:
                    books.forget(guest)
            case "come back" if not here:
                self.guests[place] = guest = max(self.guests) + 1
                self.ledger.join(guest, waits=place % 2 == 0, now_ns=self.now_ns)
                books.strict[guest], books.sent[guest] = place % 2 == 0, 0
                books.leases[guest] = self.now_ns + LEASE_NS

    @staticmethod
    def accepted(say: Callable[[], None], *, unless: bool) -> bool:
        try:
            say()
        except MessageError:
            assert unless, "fault: what is right was refused"
            return False
        assert not unless, "fault: what is wrong was taken"
        return True

    @rule(what=st.sampled_from(DAEMON_ACTIONS), keys=st.lists(st.sampled_from(KEYS), max_size=3), number=st.integers(0, 5))
    def daemon_does(self, what: str, keys: list[GrantKey], number: int) -> None:
        match what:
            case "recall" | "recall everything":
                self.make_round(keys, everything=what == "recall everything")
            case "recall all of one":
                guest = self.guests[number % PLACES]
                if guest in self.books.leases:
                    self.make_round(keys, everything=True, only=guest)
                else:
                    self.accepted(lambda: self.make_round(keys, everything=True, only=guest), unless=True)
            case "abandon" if self.expected:
                expected = self.expected[-1 - number % len(self.expected)]
                expected.abandoned |= self.is_pending(expected)
                self.ledger.abandon(expected.round_)
            case "time passes":
                self.now_ns += [1, 30, 60][number % 3]
                due = sorted((at_ns, guest) for guest, at_ns in self.books.leases.items() if at_ns <= self.now_ns)
                assert self.ledger.evict_due(self.now_ns) == tuple(guest for _, guest in due), "leases: not those that are over"
                for _, guest in due:
                    self.books.forget(guest)
                late = [one for one in self.expected if one.round_.pending and one.round_.until_ns <= self.now_ns]
                assert not late, "bound: a round waits longer than it said"
            case "look away":
                self.now_ns += [1, 10, 40][number % 3]

    def make_round(self, keys: list[GrantKey], *, everything: bool, only: int | None = None) -> None:
        woken: list[None] = []

        def wake() -> None:
            woken.append(None)

        ledger, now_ns = self.ledger, self.now_ns
        if only is not None:
            round_ = ledger.recall_all_from(only, wake, now_ns)
        else:
            round_ = ledger.recall_everything(wake, now_ns) if everything else ledger.recall(keys, wake, now_ns)
        tell, waits_for = self.books.recall(set(KEYS if everything else keys), everything=everything, only=only)
        assert not woken, "wake: inside the recall"
        assert {(guest, serial, frozenset(told)) for guest, serial, told in round_.tell} == tell, "told: not whom it concerns"
        assert len(round_.tell) == len(tell), "told: twice"
        assert self.now_ns <= round_.until_ns <= self.now_ns + LEASE_NS, "bound: longer than a lease"
        self.expected = [*self.expected[-7:], Expected(round_, waits_for, woken, bool(waits_for))]

    def is_pending(self, expected: Expected) -> bool:
        there = {(recall.guest, recall.serial) for recall in self.books.recalls}
        return not expected.abandoned and bool(expected.waits_for & there)

    # --- what must hold ---

    @invariant()
    def rounds_wait_as_they_must(self) -> None:
        for expected in self.expected:
            pending = self.is_pending(expected)
            assert expected.round_.pending == pending, "waits: for too little or too much"
            ended = expected.was_pending and not pending and not expected.abandoned
            assert len(expected.woken) == ended, "wake: not once when nothing is owed any more"

    @invariant()
    def held_is_what_is_held(self) -> None:
        for key in KEYS:
            assert self.ledger.is_held([key]) == self.books.is_held(key), "held: not what the books say"

    @invariant()
    def the_figures_agree(self) -> None:
        books, figures = self.books, self.ledger.statistics()
        assert (figures.guests, figures.lost) == (len(books.leases), len(books.lost)), "figures: guests"
        assert figures.registrations == len(books.sharers), "figures: registrations"
        assert figures.unacked == len(books.recalls), "figures: unacked"
        assert figures.waiting >= sum(map(self.is_pending, self.expected)), "figures: waiting"
        assert self.ledger.next_deadline_ns == min(books.leases.values(), default=None), "leases: the next end"

    @invariant()
    def the_ledger_is_sound(self) -> None:
        if self.looks_inside:
            self.ledger.check()

    def teardown(self) -> None:
        """When all have gone, nothing is left."""
        for guest in self.guests:
            self.ledger.leave(guest)
        self.ledger.check()
        assert self.ledger.statistics()[:6] == (0, 0, 0, 0, 0, 0), "left: something"
        assert not any(expected.round_.pending for expected in self.expected), "left: somebody waits"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=100, stateful_step_count=40)


def walk(machine: LedgerMachine, random: Random) -> None:
    """Drive the machine through 50 steps, every one as likely as the next (see `test_table_machine.walk`)."""
    for _ in range(50):
        if random.random() < 0.6:
            keys: list[int] = random.choices([*KEYS * 4, *BAD_KEYS], k=random.randrange(4))
            machine.guest_does(random.choice(GUEST_ACTIONS), random.randrange(PLACES), keys, random.randrange(-1, 4))
        else:
            keys_to_recall = random.choices(KEYS, k=random.randrange(1, 3))
            machine.daemon_does(random.choice(DAEMON_ACTIONS), keys_to_recall, random.randrange(6))
        machine.rounds_wait_as_they_must()
        machine.held_is_what_is_held()
        machine.the_figures_agree()
        machine.the_ledger_is_sound()


def walk_all(machine_type: type[LedgerMachine], walks: int) -> None:
    for seed in range(walks):
        machine = machine_type()
        walk(machine, Random(seed))
        if machine.looks_inside:
            machine.teardown()


def test_the_books_agree_on_uniform_walks() -> None:
    walk_all(LedgerMachine, 500)


# --- negative controls: one broken rule each ----------------------------------------------------------------------


def broken(*replacements: tuple[str, str]) -> type[Ledger]:
    """The ledger with some pieces of its source replaced, and nothing else."""
    source = Path(ledger_module.__file__).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"the source has no such place, or several: {old}"
        source = source.replace(old, new)
    namespace: dict[str, Any] = {"__name__": ledger_module.__name__}
    exec(compile(source, "broken ledger", "exec", dont_inherit=True), namespace)  # it is our own source
    broken_type: type[Ledger] = namespace["Ledger"]
    return broken_type


CONTROLS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "1: stays a sharer until it acks": ("told|figures|fault", [("sharer.keys.difference_update(its_keys)", "continue")]),
    "1: an ack pays for a later recall, too": (
        "held|waits",
        [
            ("owed = self._owed[key]\n", "owed = self._owed.get(key, {})\n"),
            ("if owed[debtor.number] == paid:", "if debtor.number in owed:"),
            ("del self._owed[key]", "self._owed.pop(key, None)"),
        ],
    ),
    "2: serials have gaps": ("told", [("sharer.sent += 1", "sharer.sent += 2")]),
    "2: an ack is for one recall only": ("waits", [("peekitem(0)[0] <= serial:", "peekitem(0)[0] == serial:")]),
    "2: an ack of what was never sent": ("fault", [("if not 1 <= serial <= debtor.sent:", "if serial < 1:")]),
    "3: forgets what overlapping rounds recalled": (
        "waits", [("owed[guest] = max(serial, owed.get(guest, 0))", "continue")],
    ),
    "3: forgets recalls of everything": ("waits", [("owed = dict(self._sweeps) if keys else {}", "owed = {}")]),
    "3: a recall of everything forgets the others": (
        "waits", [("if guest.waits and guest.acked < guest.sent:", "if guest.number in self._sweeps:")],
    ),
    "3: waits for prompt guests": (
        "waits|held", [("if sharer.waits:\n                owed[", "if True:\n                owed[")],
    ),
    "3: a recall from one is not one of each key": (
        "waits|held", [("                self._sweeps[guest.number] = swept", "                pass")],
    ),
    "4: who leaves is waited for": ("waits", [("self._settle(peer, peer.sent)", "pass")]),
    "4: claims to wait for less": ("bound", [("until_ns = max(", "until_ns = min(")]),
    "5: a debtor is renewed": ("renewal", [("if peer.lost or peer.acked < owed:", "if peer.lost:")]),
    "5: a prompt debtor is renewed": ("renewal", [("or peer.acked < owed", "or peer.debts")]),
    "6: leases end a moment late": ("leases", [("pop_due(now_ns)", "pop_due(now_ns - 1)")]),
    "7: a lost guest is renewed": ("renewal", [("if peer.lost or peer.acked", "if peer.acked")]),
    "7: a lost guest is told": ("told", [("if not sharer.lost:", "if True:")]),
    "7: a lost guest is forgotten": ("waits|figures|held", [("peer.lost = True", "self.leave(guest)")]),
    "8: half a registration is taken": (
        "figures|fault",
        [("(keys) - sharer.keys\n", "(keys) - sharer.keys\n        sharer.keys |= set(list(more)[:1])\n")],
    ),
    "8: one key more": ("fault", [("> self._max_keys:", "> self._max_keys + 1:")]),
    "8: keys that the table does not have": ("fault", [("<= max(keys) < self._key_count", "<= max(keys)")]),
    "9: acked keys stay in the books": ("held", [("if not owed:\n", "if owed is None:\n")]),
    "10: who owes is not held": ("held", [("if key in sharers or key in owed:", "if key in sharers:")]),
    "10: a recall of everything is not held": ("held", [("return bool(self._sweeps)", "return False")]),
    "wakes for each guest": (
        "wake", [("if not round_.pending:\n                    over", "if True:\n                    over")],
    ),
    "wakes nobody": ("wake", [("            round_.wake()", "            pass")]),
    "wakes whoever has given up": ("waits|wake", [("        round_.owed.clear()\n", "")]),
}  # fmt: skip


@pytest.mark.parametrize("rule_broken", CONTROLS)
def test_the_machine_catches(rule_broken: str) -> None:
    complaint, replacements = CONTROLS[rule_broken]

    class Control(LedgerMachine):
        ledger_type = broken(*replacements)
        looks_inside = False

    with pytest.raises(AssertionError, match=f"^({complaint}):"):
        walk_all(Control, 500)


# --- the method without a lock ------------------------------------------------------------------------------------


def at_each_step(of: Callable[[], object], step: int | None, do: Callable[[], None]) -> int:
    """Run `of`, and `do` before its bytecode instruction number `step` in the ledger (None: before each); returns how many."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_globals.get("__name__") != ledger_module.__name__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            if step is None or step == count:
                do()
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        of()
    finally:
        sys.settrace(before)
    return count


def never_missed(ledger_type: type[Ledger], *, of: str) -> None:
    """Between its registration and its ack, a strict guest's key is held, wherever recall and `is_held` meet."""
    key = GrantKey(1)

    def prepared() -> Ledger:
        ledger = ledger_type(lease_ns=LEASE_NS, slot_count=SLOT_COUNT)
        ledger.join(1, waits=True, now_ns=0)
        ledger.register(1, [key])
        return ledger

    def recall() -> None:
        if of == "everything":
            ledger.recall_everything(lambda: None, 0)
        elif of == "one guest":
            ledger.recall_all_from(1, lambda: None, 0)
        else:
            ledger.recall([key], lambda: None, 0)

    def look() -> None:
        seen.append(ledger.is_held([key]))

    seen: list[bool] = []
    ledger = prepared()
    assert at_each_step(recall, None, look) > 50
    assert all(seen), "missed: looked in the middle of a recall"

    step, steps = 0, 1
    while step < steps:
        ledger = prepared()
        steps = at_each_step(look, step, recall)
        assert all(seen), "missed: a recall in the middle of the look"
        step += 1
    assert steps > 10


@pytest.mark.parametrize("of", ["some keys", "one guest", "everything"])
def test_is_held_misses_nothing_without_a_lock(of: str) -> None:
    never_missed(Ledger, of=of)


FIRST_LOAD = "        for key in keys:\n            if key in sharers"
FIRST_STORE = "        tell: list[Tell] = []\n        for sharer"
FIRST_STORE_OF_ALL = "        for guest in self._guests.values():\n            self._sweep("
STORE_OF_ONE, STRIKE_ONE = "        self._sweep(sharer, tell, owed)\n", "        self._strike(sharer, set(sharer.keys))"
STRIKE_ALL = "        self._sharers.clear()\n"

ORDERS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "reads in the other order": ("some keys", [("if key in sharers or key in owed:", "if key in owed or key in sharers:")]),
    "strikes out before it writes down": ("some keys", [(FIRST_STORE, STRIKE_ALL + FIRST_STORE)]),
    "reads what all owe first": (
        "everything",
        [
            (FIRST_LOAD, "        if self._sweeps:\n            return True\n" + FIRST_LOAD),
            ("return bool(self._sweeps)", "return False"),
        ],
    ),
    "strikes out all before it writes down": ("everything", [(FIRST_STORE_OF_ALL, STRIKE_ALL + FIRST_STORE_OF_ALL)]),
    "strikes out one's before it writes down": (
        "one guest", [(STORE_OF_ONE, f"        keys = set(sharer.keys)\n{STRIKE_ONE}\n        sharer.keys = keys\n{STORE_OF_ONE}"),
                      (f"{STRIKE_ONE}  # after", "        sharer.keys = set()  # after")],
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_loads_and_stores_matters(order: str) -> None:
    of, replacements = ORDERS[order]
    with pytest.raises(AssertionError, match=r"^missed:"):
        never_missed(broken(*replacements), of=of)

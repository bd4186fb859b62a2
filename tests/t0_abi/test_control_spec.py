"""docs/spec/control.md is compared with the code: every message, limit, state and name in it."""

import errno
import re
from dataclasses import fields
from pathlib import Path

import pytest

from coherency import leases, protocol, protocol_stream, rendezvous
from coherency.daemon.leasing import MAX_LOST_ON_A_LINE, MAX_RENEWALS
from coherency.daemon.peer_states import TRANSITIONS, PeerEvent, PeerState
from coherency.daemon.runtime import DIRECTORY_MODE
from coherency.daemon.server import SOCKET_MODE
from coherency.daemon.switchboard import Limits
from coherency.events import Event, EventKind
from coherency.guest_agent.client import LINK_TRANSITIONS, LinkEvent, LinkState
from coherency.guest_agent.requests import Patience
from coherency.guest_agent.virtual_machine import IVSHMEM, IVSHMEM_REGION
from coherency.protocol import CATALOGUE, HEADER, MAGIC, RefusalCode, wire_fields
from coherency.protocol_fields import MAX_ITEMS, REPORT_KEYS, Report

SPEC = (Path(__file__).resolve().parents[2] / "docs/spec/control.md").read_text()
Row = dict[str, str]
MESSAGES = {entry.message.__name__: entry for entry in CATALOGUE}
EVENTS = {event.value: event for event in PeerEvent} | {name: entry.message for name, entry in MESSAGES.items()}


def section(heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", SPEC, re.MULTILINE | re.DOTALL)
    assert found, f"no section '{heading}'"
    return found[1]


def tables(text: str) -> list[list[Row]]:
    """The tables of a text, each a list of rows by the titles of the columns."""
    result = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.strip().split("\n")]
        titles, rule, *rows = lines
        assert set("".join(rule)) == {"-"}
        assert all(len(row) == len(titles) for row in rows), block
        result.append([dict(zip(titles, row, strict=True)) for row in rows])
    return result


def table(heading: str, first_column: str) -> list[Row]:
    """The one table of a section whose first column has this title."""
    (found,) = [rows for rows in tables(section(heading)) if next(iter(rows[0])) == first_column]
    return found


def plain(cell: str) -> str:
    return cell.strip("`")


def test_the_version_is_in_the_title() -> None:
    assert SPEC.startswith(f"# The control protocol, version {protocol.PROTOCOL_VERSION}\n")


def test_rendezvous() -> None:
    names = [plain(row["entry"]) for row in table("1. Rendezvous", "entry")]
    assert names == [
        rendezvous.LOCK_FILE_NAME,
        rendezvous.CONTROL_SOCKET_NAME,
        rendezvous.TABLE_LINK_NAME,
        rendezvous.EXPORT_DIRECTORY_NAME,
        rendezvous.WINDOW_DIRECTORY_NAME,
        rendezvous.SESSIONS_FILE_NAME,
    ]
    assert f"`{rendezvous.DEFAULT_RUNTIME_ROOT}`" in section("1. Rendezvous")
    assert f"stream, mode {SOCKET_MODE:04o}" in section("1. Rendezvous")
    assert f"`ROOT/NAME`, mode {DIRECTORY_MODE:04o}" in section("1. Rendezvous")


def test_header() -> None:
    rows = table("2. Frames", "offset")
    assert [(row["offset"], row["bytes"]) for row in rows] == [
        ("0", "4"),
        ("4", "4"),
        ("8", "4"),
        (str(HEADER.size), "length"),
    ]
    assert HEADER.format == "<4sII"
    assert rows[0]["value"] == f"`{MAGIC.decode()}` in ASCII"


def test_limits_of_frames() -> None:
    assert {row["limit"]: int(row["value"]) for row in table("2. Frames", "limit")} == {
        "frame": protocol.MAX_FRAME_BYTES,
        "payload": protocol.MAX_PAYLOAD_BYTES,
        "items": MAX_ITEMS,
    }


def test_every_message_is_specified_and_no_other() -> None:
    specified = re.findall(r"^### (\w+)$", SPEC, re.MULTILINE)
    assert specified == list(MESSAGES), "in the order of the catalogue"


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name: str) -> None:
    entry, text = MESSAGES[name], section(name)
    heads = dict(re.findall(r"^\* ([a-z ]+): (.*)$", text, re.MULTILINE))
    assert heads == {
        "type id": f"{entry.type_id:#04x}",
        "sender": ", ".join(side.value for side in entry.senders),
        "replies": ", ".join(reply.__name__ for reply in entry.replies) or "none",
        "descriptors": str(entry.descriptors),
    }
    rows = [row for rows in tables(text) if "field" in rows[0] for row in rows]
    assert [(row["field"], plain(row["kind"])) for row in rows] == [
        (field, kind.notation) for field, kind in wire_fields(entry.message)
    ]
    assert all((row["unit"] == "nanoseconds") == row["field"].endswith("_ns") for row in rows)
    assert all((row["unit"] == "bytes") == row["field"].endswith("_bytes") for row in rows)


def test_refusal_codes() -> None:
    rows = table("Refusal", "code")
    assert {int(row["code"]): row["name"] for row in rows} == {code.value: code.name.lower() for code in RefusalCode}


def test_report() -> None:
    rows = table("StatusReply", "key")
    assert {plain(row["key"]): plain(row["kind"]) for row in rows} == {
        key: kind.notation for key, kind in REPORT_KEYS.items()
    }
    report = Report()
    assert f"`{report.number.notation}` or a `{report.text.notation}`" in section("StatusReply")
    assert f"from `{report.key.notation}` to values" in section("StatusReply")


def test_type_ids_are_unique() -> None:
    ids = [entry.type_id for entry in CATALOGUE]
    assert len(ids) == len(set(ids)) == len(MESSAGES)


def test_every_first_message_begins_with_the_version() -> None:
    openers = {happened for state, happened in TRANSITIONS if state is PeerState.OPENED} - {protocol.Goodbye}
    for message in [*openers, protocol.Welcome]:
        if not isinstance(message, PeerEvent):
            assert wire_fields(message)[0][0] == "protocol", message


def test_states_at_the_daemon() -> None:
    specified = {}
    open_states = [state for state in PeerState if state is not PeerState.CLOSED]
    for row in table("5. The life of a connection, at the daemon", "state"):
        states = open_states if row["state"] == "open states" else [PeerState(row["state"])]
        for state in states:
            assert (state, EVENTS[row["event"]]) not in specified
            specified[state, EVENTS[row["event"]]] = PeerState(row["next state"])
    assert specified == TRANSITIONS


def test_what_a_state_takes_is_what_its_side_may_send() -> None:
    guest_states = (PeerState.GUEST, PeerState.GUEST_ASKING)
    for state, happened in TRANSITIONS:
        if isinstance(happened, PeerEvent):
            continue
        senders = MESSAGES[happened.__name__].senders
        if state is PeerState.OPENED:
            assert protocol.Side.DAEMON not in senders
        else:
            assert (protocol.Side.GUEST if state in guest_states else protocol.Side.OPERATOR) in senders


def test_states_at_the_guest() -> None:
    rows = table("6. The life of a connection, at the guest", "state")
    assert {(LinkState(row["state"]), LinkEvent(row["event"])): LinkState(row["next state"]) for row in rows} == dict(
        LINK_TRANSITIONS
    )


@pytest.mark.parametrize(
    ("heading", "defaults"),
    [
        ("5. The life of a connection, at the daemon", Limits()),
        ("6. The life of a connection, at the guest", Patience()),
    ],
)
def test_limits(heading: str, defaults: Limits | Patience) -> None:
    suffix = {"nanoseconds": "_ns", "bytes": "_bytes", "connections": ""}
    specified = {row["limit"] + suffix[row["unit"].split(" ")[0]]: int(row["value"]) for row in table(heading, "limit")}
    assert specified == {field.name: getattr(defaults, field.name) for field in fields(defaults)}


def test_events() -> None:
    rows = table("10. Events", "place")
    assert [int(row["place"]) for row in rows] == list(range(len(Event._fields)))
    assert {int(row["kind"]): row["name"] for row in table("10. Events", "kind")} == {
        kind.value: kind.name.lower() for kind in EventKind
    }


def test_limits_of_grants() -> None:
    assert {row["limit"]: int(row["value"]) for row in table("8. Grants", "limit")} == {
        "default_lease": leases.DEFAULT_LEASE_NS,
        "shortest_lease": leases.SHORTEST_LEASE_NS,
        "longest_lease": leases.LONGEST_LEASE_NS,
        "max_keys_per_message": leases.MAX_KEYS_PER_MESSAGE,
        "max_keys_per_guest": leases.MAX_KEYS_PER_GUEST,
        "renewals": MAX_RENEWALS,
    }


def test_limits_of_serial_lines() -> None:
    assert {row["limit"]: int(row["value"]) for row in table("9. Serial lines", "limit")} == {
        "skipped": protocol_stream.MAX_SKIPPED_BYTES,
        "false_starts": protocol_stream.MAX_FALSE_STARTS,
        "starts": protocol_stream.MAX_STARTS,
        "lost": MAX_LOST_ON_A_LINE,
    }
    vendor, device = IVSHMEM
    assert f"region {IVSHMEM_REGION} of a PCI device {vendor:04x}:{device:04x}" in section("9. Serial lines")
    assert f"answers {errno.errorcode[errno.EISCONN]}" in section("8. Grants")


def test_negative_control_the_comparison_sees_a_change() -> None:
    """The parser does not pass everything: a changed cell is another cell."""
    rows = tables(section("Hello").replace("`u32`", "`u64`", 1))[0]
    assert [(row["field"], plain(row["kind"])) for row in rows] != [
        (field, kind.notation) for field, kind in wire_fields(protocol.Hello)
    ]

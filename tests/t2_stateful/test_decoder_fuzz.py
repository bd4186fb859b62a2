"""Whatever bytes come, in whatever pieces: messages or a `PeerError`, and always the same ones."""

from itertools import pairwise

import msgpack
from hypothesis import example, given
from hypothesis import strategies as st

from coherency.errors import PeerError
from coherency.protocol import HEADER, MAX_FRAME_BYTES, Message, decode_payload, encode
from coherency.protocol_stream import Decoder
from tests.control_messages import frame, messages

# What msgpack can say, legal here or not, and what it cannot.
PACKABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=70)
    | st.binary(max_size=70)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    lambda inner: (
        st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)
PAYLOADS = st.binary(max_size=60) | st.builds(
    msgpack.packb, PACKABLE | st.lists(PACKABLE, min_size=1).map(lambda items: [1, *items])
)


@st.composite
def damaged_streams(draw: st.DrawFn) -> bytes:
    """Legal messages with some bytes changed, lost, doubled or put in."""
    data = bytearray(b"".join(map(encode, draw(st.lists(messages(), min_size=1, max_size=4)))))
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, len(data) - 1)) if data else 0
        match draw(st.sampled_from(["change", "lose", "double", "insert"])):
            case "change":
                data[position : position + 1] = draw(st.binary(min_size=1, max_size=1))
            case "lose":
                del data[position : position + draw(st.integers(1, 8))]
            case "double":
                data[position:position] = data[position : position + 20]
            case _:
                data[position:position] = draw(st.binary(max_size=8))
    return bytes(data)


def outcome(data: bytes, cuts: list[int]) -> tuple[list[Message], type[PeerError] | None, int]:
    """The messages of a stream, how it ended, and what is held at the end.  Fails if anything but a PeerError comes."""
    decoder, decoded = Decoder(), []
    for start, end in pairwise(sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})):
        try:
            decoded += decoder.feed(data[start:end])
        except PeerError as error:
            decoder.check()
            return decoded, type(error), 0
        decoder.check()
    return decoded, None, decoder.statistics().held_bytes


@given(st.binary(max_size=200))
@example(b"")
def test_random_bytes(data: bytes) -> None:
    outcome(data, [])


@given(PAYLOADS)
def test_random_payloads_in_sound_frames(payload: bytes) -> None:
    decoded, fault, _ = outcome(frame(payload), [])
    assert bool(decoded) != bool(fault)


@given(damaged_streams(), st.lists(st.integers(0, 10000), max_size=20))
def test_the_outcome_does_not_depend_on_the_cuts(data: bytes, cuts: list[int]) -> None:
    """With one exception, which is documented: messages in the piece that shows the fault are lost."""
    by_byte, fault, held = outcome(data, list(range(len(data))))
    decoded, fault_too, held_too = outcome(data, cuts)
    assert (fault_too, held_too) == (fault, held)
    assert decoded == by_byte if fault is None else decoded == by_byte[: len(decoded)]


@given(damaged_streams())
def test_what_is_accepted_is_what_somebody_sent(data: bytes) -> None:
    """A message that comes through damage is encoded to bytes that are in the stream: the checksum does its work."""
    decoded, _, held = outcome(data, list(range(len(data))))
    for message in decoded:
        payload = encode(message)[HEADER.size :]
        assert decode_payload(payload) == message
    assert held < MAX_FRAME_BYTES
    assert b"".join(map(encode, decoded)) == data[: sum(len(encode(message)) for message in decoded)]

"""The workload of the kill tests knows what may be found afterwards: it must see each kind of damage."""

import pytest

from tests.workload import Rename, State, Unlink, Worker, Write

BEFORE: State = {"a": b"one", "b": b"two"}
CREATE = Write("c", None, b"three", 2)
APPEND = Write("a", b"one", b"more", 2)


@pytest.mark.parametrize(
    ("operation", "found"),
    [
        (CREATE, BEFORE),
        (CREATE, BEFORE | {"c": b""}),
        (CREATE, BEFORE | {"c": b"th"}),
        (CREATE, BEFORE | {"c": b"three"}),
        (APPEND, BEFORE),
        (APPEND, BEFORE | {"a": b"onemo"}),
        (Rename("a", "b"), {"b": b"one"}),
        (Rename("a", "c"), {"b": b"two", "c": b"one"}),
        (Rename("a", "c"), BEFORE),
        (Unlink("a"), BEFORE),
        (Unlink("a"), {"b": b"two"}),
    ],
)
def test_what_an_operation_under_way_may_leave(operation: Write | Rename | Unlink, found: State) -> None:
    assert operation.explains(BEFORE, found)


@pytest.mark.parametrize(
    ("operation", "found"),
    [
        (CREATE, BEFORE | {"c": b"thx"}),
        (CREATE, BEFORE | {"c": b"three and more"}),
        (CREATE, BEFORE | {".c.tmp": b"three"}),
        (CREATE, {"a": b"one", "c": b"three"}),
        (APPEND, BEFORE | {"a": b"on"}),
        (APPEND, BEFORE | {"a": b""}),
        (APPEND, {"b": b"two"}),
        (APPEND, BEFORE | {"a": b"onemore", "b": b"tw"}),
        (Rename("a", "b"), {"a": b"one"}),
        (Rename("a", "b"), {"a": b"one", "b": b"one"}),
        (Rename("a", "b"), {}),
        (Rename("a", "c"), BEFORE | {"c": b"one"}),
        (Rename("a", "c"), {"b": b"two"}),
        (Unlink("a"), {}),
    ],
)
def test_what_it_may_not_leave(operation: Write | Rename | Unlink, found: State) -> None:
    assert not operation.explains(BEFORE, found)


def test_the_same_seed_does_the_same() -> None:
    def chosen(seed: int) -> list[Write | Rename | Unlink]:
        worker = Worker("", seed)
        operations = []
        for _ in range(50):
            operation = worker._choose()
            worker.state = operation.result(worker.state)
            operations.append(operation)
        return operations

    assert chosen(1) == chosen(1) != chosen(2)
    assert {type(operation) for operation in chosen(1)} == {Write, Rename, Unlink}

"""The machines of this level are booted once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.t5_vm.bed import Bed


@pytest.fixture(scope="session")
def bed(make_socket_dir: Callable[[], Path]) -> Iterator[Bed]:
    with Bed.made(make_socket_dir()) as bed:
        yield bed

"""Every operation through the export, and through a guest's mount: agent, export and daemon together."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guests import Host
from tests.scenarios import ALL
from tests.scenarios.comparing import Scenario, compare


@pytest.fixture(scope="module", params=["export", "none", "access", "strict", "prompt"])
def mounted(request: pytest.FixtureRequest, make_socket_dir: Callable[[], Path]) -> Iterator[tuple[Path, Path]]:
    """The export or the mount of a guest, and the share behind it."""
    with Host(make_socket_dir()) as host:
        yield host.export if request.param == "export" else host.mount("guest", request.param), host.share


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.__name__)
def test_same_as_a_plain_directory(mounted: tuple[Path, Path], scenario: Scenario, tmp_path: Path) -> None:
    compare(scenario, tmp_path, *mounted)

"""What a local file system does, the export and every guest's mount do: `tests/posix`."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from tests.passthrough import Served
from tests.posix import (
    ALL,
    MATTER_OF_CACHES,
    between,
    contents,
    deviations,
    directories,
    faulty,
    names,
    open_files,
    permissions,
    renames,
    times,
    xattrs,
)
from tests.posix.deviations import Deviation
from tests.posix.ground import EXPORT, LOCAL, LOCAL_AGAIN, Ground, new_ground
from tests.scenarios.comparing import Scenario

TRIES = 5


@pytest.fixture(scope="module")
def ground(make_socket_dir: Callable[[], Path]) -> Iterator[Ground]:
    with new_ground(make_socket_dir()) as ground:
        yield ground


def name_of(scenario: Callable[..., object]) -> str:
    return f"{scenario.__module__.rpartition('.')[2]}-{scenario.__name__}"


@pytest.mark.parametrize("scenario", ALL, ids=name_of)
@pytest.mark.parametrize("place", [LOCAL, EXPORT, "strict", "access"])
def test_as_on_a_local_file_system(ground: Ground, place: str, scenario: Scenario) -> None:
    scenario(*ground.directory(scenario.__name__, place))


@pytest.mark.parametrize("scenario", MATTER_OF_CACHES, ids=name_of)
@pytest.mark.parametrize("place", ["none", "prompt", "auto", "always"])
def test_also_with_other_caches(ground: Ground, place: str, scenario: Scenario) -> None:
    scenario(*ground.directory(scenario.__name__, place))


@pytest.mark.parametrize("scenario", between.SCENARIOS, ids=name_of)
@pytest.mark.parametrize(
    "places", [(LOCAL, LOCAL_AGAIN), ("strict", "strict-again"), ("access", "strict"), ("strict", "access")], ids="+".join
)
def test_two_guests_as_two_mounts_of_a_local_file_system(
    ground: Ground, places: tuple[str, str], scenario: between.Between
) -> None:
    scenario(*ground.directory(scenario.__name__, *places))


# --- where we do something else -----------------------------------------------------------------------------------


def by_place(places_of: Callable[[Deviation], Iterable[tuple[str, ...]]]) -> list[Any]:
    return [
        pytest.param(each, places, id=f"{each.look.__name__}-{'+'.join(places)}")
        for each in deviations.ALL
        for places in places_of(each)
    ]


def where_it_is_right(deviation: Deviation) -> list[tuple[str, ...]]:
    count = len(next(iter(deviation.ours)))
    return [(LOCAL, LOCAL_AGAIN)[:count], *deviation.right_on]


@pytest.mark.parametrize(("deviation", "places"), by_place(where_it_is_right))
def test_what_a_local_file_system_does(ground: Ground, deviation: Deviation, places: tuple[str, ...]) -> None:
    assert deviation.look(*ground.directory(deviation.look.__name__, *places)) == deviation.local


@pytest.mark.parametrize(("deviation", "places"), by_place(lambda deviation: deviation.ours))
def test_what_we_do_instead(ground: Ground, deviation: Deviation, places: tuple[str, ...]) -> None:
    """Within a few tries: on a machine that is late a kernel may not have been granted what it would be wrong about."""
    seen: list[Any] = []
    while deviation.ours[places] not in seen:
        assert len(seen) < TRIES, f"not {deviation.ours[places]!r} but {seen!r}"
        seen.append(deviation.look(*ground.directory(deviation.look.__name__, *places)))


# --- controls -----------------------------------------------------------------------------------------------------


class Faulty(Served):
    server: ClassVar[ModuleType] = faulty


@pytest.fixture(scope="module")
def faulty_mount(make_socket_dir: Callable[[], Path]) -> Iterator[Faulty]:
    root = make_socket_dir()
    share, mountpoint = root / "share", root / "mounted"
    share.mkdir()
    mountpoint.mkdir()
    directories.prepare(share)
    with Faulty(share, mountpoint, log=root / "server.log") as served:
        yield served


FOUND_BY: dict[str, Scenario] = {
    "ignores the umask": permissions.the_umask_takes_bits_away,
    "makes all for root's group": permissions.new_files_belong_to_the_effective_user_and_group,
    "keeps set-id bits": permissions.writing_takes_set_id_bits_away,
    "renames instead of exchanging": renames.any_two_names_can_be_exchanged,
    "keeps the time of the content": times.changing_the_content,
    "sets omitted times": times.now_and_omit,
    "has no times before 1970": times.far_and_negative_times,
    "cuts files off in blocks": contents.what_was_never_written_is_zero,
    "loses files without names": open_files.without_a_name_everything_goes_on,
    "copies instead of linking": names.links_of_files_are_counted,
    "sets attributes whatever is there": xattrs.set_replaced_and_removed,
    "shows trusted attributes to all": xattrs.who_may_read_and_set_attributes,
    "lists some entries twice": directories.every_entry_once,
    "does not list some entries": directories.what_stays_is_listed_once_while_others_come_and_go,
}


@pytest.mark.parametrize("fault", FOUND_BY)
def test_control_a_fault_is_found(faulty_mount: Faulty, fault: str) -> None:
    for number, present in enumerate(("", fault)):
        directory = faulty_mount.mountpoint / f"{fault[:30]}-{number}"
        directory.mkdir()
        directory.chmod(0o777)
        faulty_mount.ask("have", present)
        try:
            if present:
                with pytest.raises((AssertionError, OSError)):
                    FOUND_BY[fault](directory)
            else:
                FOUND_BY[fault](directory)
        finally:
            faulty_mount.ask("have", "")


def test_control_appending_where_the_kernel_says_loses_what_others_append(
    faulty_mount: Faulty, make_socket_dir: Callable[[], Path]
) -> None:
    root = make_socket_dir()
    (root / "mounted").mkdir()
    with Faulty(faulty_mount.directory, root / "mounted", log=root / "server.log") as other:
        deviations.the_offset_is_where_it_was_appended(faulty_mount.mountpoint, other.mountpoint)
        try:
            for served in (faulty_mount, other):
                served.ask("have", "believes the kernel's offset")
            (other.mountpoint / "f").unlink()
            with pytest.raises(AssertionError):
                deviations.the_offset_is_where_it_was_appended(faulty_mount.mountpoint, other.mountpoint)
        finally:
            faulty_mount.ask("have", "")

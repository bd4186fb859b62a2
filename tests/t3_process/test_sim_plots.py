"""What workers of all guests know together: one changes a group at a time, and all know what is being changed."""

from pathlib import Path

import pytest

from coherency.sim.calls import ATTRIBUTE_FILES, KEPT, NAMES, RACE, Group, Scene
from coherency.sim.names import Entry
from coherency.sim.plots import Plots, prepare_plots
from coherency.sim.workload import Kept

SCENE = Scene(names=2, trees=1, kept=1, races=1)
GROUP, FILE, RACED = Group(NAMES, 1), Group(KEPT, 0), Group(RACE, 0)
THERE = Entry(0o100644, 7)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Plots, Plots]:
    prepare_plots(tmp_path, SCENE)
    return Plots(tmp_path, SCENE), Plots(tmp_path, SCENE)


def test_one_at_a_time_and_the_next_one_finds_what_is_there(two: tuple[Plots, Plots]) -> None:
    one, other = two
    with one.locked(GROUP) as held:
        assert held is not None
        generation, names = held
        assert generation == 0
        assert isinstance(names, dict)
        assert set(names.values()) == {None}
        with other.locked(GROUP) as nothing:
            assert nothing is None
        one.store(GROUP, 0, names | {next(iter(names)): THERE})
    with other.locked(GROUP) as held:
        assert held is not None
        assert isinstance(held[1], dict)
        assert next(iter(held[1].values())) == THERE


def test_kept_files_are_remembered(two: tuple[Plots, Plots]) -> None:
    kept = Kept(THERE, True, 5, "x", 0o600)
    with two[0].locked(FILE) as held:
        assert held == (0, Kept())
        two[0].store(FILE, 0, kept)
    with two[1].locked(FILE) as held:
        assert held == (0, kept)


def test_what_is_retired_begins_anew(two: tuple[Plots, Plots]) -> None:
    with two[0].locked(FILE):
        two[0].store(FILE, 0, Kept(THERE))
        two[0].retire(FILE, 0)
    assert two[1].generations() == dict.fromkeys(SCENE.groups(), 0) | {FILE: 1}
    with two[1].locked(FILE) as held:
        assert held == (1, Kept())


def test_a_race_is_retired_once(two: tuple[Plots, Plots]) -> None:
    for plots in two:
        plots.retire_race(RACED, 0)
    assert two[0].generations()[RACED] == 1
    with two[0].locked(RACED) as held:
        assert held is not None, "nobody has kept the lock"


def test_all_know_what_is_being_changed(two: tuple[Plots, Plots]) -> None:
    one, other = two
    before = other.news
    for place in (FILE, ATTRIBUTE_FILES[-1], ATTRIBUTE_FILES[-1], GROUP, FILE):
        one.announce(place)
        assert other.announced() == place
        assert other.news != before
        before = other.news

"""Metadata, constraints and documents that must agree."""

import re
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

import coherency

ROOT = Path(__file__).resolve().parents[2]


def constraints() -> dict[NormalizedName, str]:
    """Exact versions."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, pinned = line.partition("==")
            pins[canonicalize_name(name)] = pinned
    return pins


def needed(requirements: Iterable[str]) -> Iterator[str]:
    """Names of what an installation of these brings in here, with all that those need in turn."""
    seen = set()
    environment = {name: str(value) for name, value in default_environment().items()} | {"extra": ""}
    pending = [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name not in seen and (requirement.marker is None or requirement.marker.evaluate(environment)):
            seen.add(name)
            pending += map(Requirement, requires(name) or [])
            yield name


@pytest.fixture(scope="module")
def setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_constraints_name_everything_that_is_installed_and_nothing_else(setup: ConfigParser) -> None:
    run_time = setup["options"]["install_requires"].split()
    development = setup["options.extras_require"]["dev"].split()
    assert set(constraints()) == {*needed(run_time + development), "setuptools"}


def test_what_is_installed_is_what_the_constraints_say() -> None:
    # setuptools builds the package and is not asked for by any test.
    pinned = {name: pin for name, pin in constraints().items() if name != "setuptools"}
    assert {name: version(name) for name in pinned} == pinned


def test_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?{re.escape(coherency.__version__)}\b", changelog, re.MULTILINE)

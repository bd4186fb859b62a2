"""Scenarios that behave the same on any file system, and their comparison on two."""

from tests.scenarios import callers, files, names
from tests.scenarios.comparing import Scenario

ALL: list[Scenario] = [*files.SCENARIOS, *names.SCENARIOS, *callers.SCENARIOS]

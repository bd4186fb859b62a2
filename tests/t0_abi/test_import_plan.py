"""The imports of the package, held against the table of rooms in CONTRIBUTING.md. Standard library only."""

import ast
import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "coherency"
MAX_LINES = 450
NAMELESS = {"common", "helpers", "misc", "tools", "util", "utils"}
IMPURE = {
    "asyncio", "concurrent", "fcntl", "mmap", "multiprocessing", "pathlib", "random", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "subprocess", "tempfile",
}  # fmt: skip


# --- the plan -----------------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """One row of the table. Names are dotted, below the package; `*` and the like are patterns."""

    names: list[str]
    may_import: list[str]
    from_elsewhere: list[str]


class Plan(NamedTuple):
    """What CONTRIBUTING.md says of rooms and purity."""

    rooms: list[Room]
    pure: list[str]


def read_plan(text: str) -> Plan:
    section = text.partition("\n## The rooms\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    rooms = [Room(*(re.findall(r"`([^`]+)`", cells[column]) for column in (0, 2, 3))) for cells in rows]
    pure = re.search(r"^Pure modules:([^.]|\.(?=\w))*", section, re.MULTILINE)
    assert pure is not None
    return Plan(rooms, re.findall(r"`([^`]+)`", pure[0]))


def covers(names: list[str], module: str) -> bool:
    """Whether a module below the package is one of the names or lies below one."""
    return any(fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*") for name in names)


# --- the code -----------------------------------------------------------------------------------------------------


class Module(NamedTuple):
    """A source file; the name is dotted, below the package, and `__init__` for the package itself."""

    name: str
    path: Path
    tree: ast.Module


def modules_of(package: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        modules[name] = Module(name, path, ast.parse(path.read_bytes(), str(path)))
    return modules


def imported_names(module: Module, modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything that the module imports, at any depth, also for type checkers alone."""
    here = [PACKAGE, *(module.name.split(".") if module.name != "__init__" else [])]
    if module.path.name != "__init__.py":
        here.pop()
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    base = ".".join([*here[: len(here) - level + 1], *([base] if base else [])])
                assert base is not None
                for alias in names:
                    name = f"{base}.{alias.name}"
                    is_module = base == PACKAGE or name.removeprefix(f"{PACKAGE}.") in modules
                    yield node.lineno, name if is_module else base
            case ast.Call(func=ast.Name(id="import_module" | "__import__")) | ast.Call(
                func=ast.Attribute(attr="import_module")
            ):
                match node.args:
                    case [ast.Constant(value=str(name)), *_] if not name.startswith("."):
                        yield node.lineno, name
                    case _:
                        yield node.lineno, "<a computed name>"


def violations(package: Path, plan: Plan) -> list[str]:
    """Everything in the package that the plan does not allow, one line each."""
    modules = modules_of(package)
    found = [f"CONTRIBUTING.md: no pure module {name} exists" for name in plan.pure if name not in modules]
    for module in modules.values():
        where = f"{module.path.relative_to(package.parent)}"
        lines = len(module.path.read_bytes().splitlines())
        if lines > MAX_LINES:
            found.append(f"{where}: {lines} lines are two modules")
        if NAMELESS.intersection(module.name.split(".")):
            found.append(f"{where}: a name that says nothing")
        room = next((room for room in plan.rooms if covers(room.names, module.name)), None)
        if room is None:
            found.append(f"{where}: belongs to no room")
            continue
        pure = covers(plan.pure, module.name)
        for line, name in imported_names(module, modules):
            reason = refusal(name, room, plan, modules, pure=pure)
            if reason is not None:
                found.append(f"{where}:{line}: imports {name}: {reason}")
    return found


def refusal(name: str, room: Room, plan: Plan, modules: dict[str, Module], *, pure: bool) -> str | None:
    """Why a module of the room may not import a name; None if it may."""
    top, _, ours = name.partition(".")
    if top != PACKAGE:
        if top in sys.stdlib_module_names:
            return "not pure" if pure and top in IMPURE else None
        return None if top in room.from_elsewhere else "not for this room"
    if ours == "__version__":
        return None
    if ours not in modules or ours == "__init__":
        return "import modules, or names from the module that defines them"
    if not covers(room.names, ours) and not covers(room.may_import, ours):
        return "not for this room"
    return "not pure" if pure and not covers(plan.pure, ours) else None


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan((ROOT / "CONTRIBUTING.md").read_text())


def test_the_plan_was_read(plan: Plan) -> None:
    assert [room.names[0] for room in plan.rooms] == [
        "errors", "ids", "shm_abi", "shm_memory", "rendezvous", "events", "leases", "protocol", "vm_args", "fuse", "daemon",
        "guest_agent", "sim", "demo", "cli", "__init__",
    ]  # fmt: skip
    rooms = {room.names[0]: room for room in plan.rooms}
    assert rooms["errors"].may_import == []
    assert "guest_agent" not in rooms["daemon"].may_import
    assert "daemon" not in rooms["guest_agent"].may_import
    assert {"errors", "shm_table", "fuse.codec"} <= set(plan.pure)


def test_package_keeps_to_the_plan(plan: Plan) -> None:
    assert violations(ROOT / PACKAGE, plan) == []


def test_plan_and_metadata_name_the_same_dependencies(plan: Plan) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert {name for room in plan.rooms for name in room.from_elsewhere} == set(required)


@pytest.fixture
def package(tmp_path: Path, plan: Plan) -> Path:
    """A small package in which all is well."""
    files = {
        "__init__": "def __getattr__(name):\n from coherency.guest_agent.api import GuestAgent\n return GuestAgent",
        "errors": "",
        "ids": "from typing import NewType",
        "shm_memory": "import mmap, os\nimport posix_ipc\nfrom coherency.errors import TableError",
        "protocol": "import msgpack\nfrom .ids import Epoch",
        "daemon.__init__": '"""The daemon."""',
        "daemon.server": "from . import switchboard\nfrom ..shm_memory import x\nimport coherency.fuse.abi",
        "daemon.deadlines": "from sortedcontainers import SortedSet",
        "guest_agent.api": "from coherency import __version__, shm_memory, ids\nfrom coherency.fuse import abi, codec",
        "cli": "import click\nfrom rich.table import Table\nimportlib.import_module('coherency.daemon')",
    }
    for name in plan.pure:
        files.setdefault(name, "")
    for name, text in files.items():
        write(tmp_path / PACKAGE, name, text)
    return tmp_path / PACKAGE


def write(package: Path, name: str, text: str) -> None:
    path = package.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_tidy_package_passes(package: Path, plan: Plan) -> None:
    assert violations(package, plan) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("daemon.server", "from coherency.guest_agent import api", "coherency.guest_agent.api: not for this room"),
        ("daemon.server", "from coherency.guest_agent.api import x", "coherency.guest_agent.api: not for this room"),
        ("daemon.server", "from .. import guest_agent", "coherency.guest_agent: import modules"),
        ("daemon.server", "from ..guest_agent.api import x", "coherency.guest_agent.api: not for this room"),
        ("daemon.server", "def f():\n  import coherency.cli as c", "coherency.cli: not for this room"),
        ("guest_agent.api", "if TYPE_CHECKING:\n  from coherency import daemon", "coherency.daemon: not for this room"),
        ("guest_agent.api", "import_module('coherency.daemon.server')", "coherency.daemon.server: not for this room"),
        ("guest_agent.api", "importlib.import_module(f'coherency.{x}')", "<a computed name>: not for this room"),
        ("guest_agent.api", "import_module('.daemon', 'coherency')", "<a computed name>: not for this room"),
        ("guest_agent.api", "__import__(name)", "<a computed name>: not for this room"),
        ("guest_agent.api", "from coherency import GuestAgent", "coherency.GuestAgent: import modules"),
        ("guest_agent.api", "import coherency", "coherency: import modules"),
        ("guest_agent.api", "from coherency.daemon import *", "coherency.daemon: not for this room"),
        ("fuse.codec", "from coherency.protocol import x", "coherency.protocol: not for this room"),
        ("fuse.session", "from coherency import shm_table", "coherency.shm_table: not for this room"),
        ("shm_memory", "from coherency.ids import Epoch", "coherency.ids: not for this room"),
        ("errors", "from coherency.ids import Epoch", "coherency.ids: not for this room"),
        ("ids", "from coherency import protocol", "coherency.protocol: not for this room"),
        ("daemon.server", "import posix_ipc", "posix_ipc: not for this room"),
        ("daemon.server", "import msgpack.exceptions", "msgpack.exceptions: not for this room"),
        ("daemon.server", "from rich import print", "rich: not for this room"),
        ("cli", "import sortedcontainers", "sortedcontainers: not for this room"),
        ("cli_demo", "import click, rich", None),
        ("cli", "import numpy", "numpy: not for this room"),
        ("protocol", "import socket", "socket: not pure"),
        ("guest_agent.cache", "from coherency import shm_memory", "coherency.shm_memory: not pure"),
        ("guest_agent.cache", "from random import Random", "random: not pure"),
        ("somewhere", "", "belongs to no room"),
        ("daemon.utils", "", "a name that says nothing"),
        ("fuse.common.x", "", "a name that says nothing"),
        ("cli", "\n" * MAX_LINES, None),
        ("cli", "\n" * (MAX_LINES + 1), "451 lines are two modules"),
    ],
)
def test_each_violation_is_found(package: Path, plan: Plan, name: str, text: str, expected: str | None) -> None:
    write(package, name, text)
    found = violations(package, plan)
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(f"{PACKAGE}/{name.replace('.', '/')}.py:")
        assert expected in found[0]


def test_missing_pure_module_is_found(package: Path, plan: Plan) -> None:
    (package / "ids.py").unlink()
    assert "CONTRIBUTING.md: no pure module ids exists" in violations(package, plan)

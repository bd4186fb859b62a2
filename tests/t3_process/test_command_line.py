"""The command line where it needs no mount: help, and options that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from coherency.cli import COMMANDS, main
from tests.guests import ROOT


class Done(NamedTuple):
    code: int
    output: str
    errors: str


def coherency(*arguments: str | Path, **environment: str) -> Done:
    """In this process: starting one takes longer than all that is tested here."""
    with mock.patch("logging.basicConfig"):
        result = CliRunner(env=environment).invoke(main, [str(each) for each in arguments], prog_name="coherency")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    for code, arguments in ((0, ["--version"]), (1, ["status", "n"]), (2, ["serve", "missing", "--name", "n"])):
        done = subprocess.run(
            [sys.executable, "-m", "coherency", *arguments], cwd=tmp_path, capture_output=True, check=False, timeout=60,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COHERENCY_RUNTIME_DIR": str(tmp_path / "run")},
        )  # fmt: skip
        assert done.returncode == code, done
        assert bool(done.stdout) != bool(done.stderr)
        assert b"Traceback" not in done.stderr


def test_there_are_the_commands_that_the_documents_name() -> None:
    assert {"serve", "mount", "status", "invalidate", "demo", "vm-args", "evict", "forget"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_sentence_an_example_and_the_options(command: str) -> None:
    for option in ("--help", "-h"):
        done = coherency(command, option)
        assert done.code == 0
        lines = [line.strip() for line in done.output.splitlines()]
        assert lines[0].startswith(f"Usage: coherency {command} ")
        assert any(line.startswith(f"coherency {command}") for line in lines[1:]), done.output
        found = main.get_command(click.Context(main), command)
        assert found is not None
        parameters = [each for each in found.params if isinstance(each, click.Option)]
        assert all(each.help for each in parameters), "an option without a word"


def test_help_of_all_has_examples_and_every_command() -> None:
    done = coherency("--help")
    assert done.code == 0
    assert "coherency serve /srv/share --name work" in done.output
    assert all(f"\n  {command} " in done.output for command in COMMANDS)


def test_version() -> None:
    done = coherency("--version")
    assert (done.code, done.output, done.errors) == (0, "coherency, version 0.1.0\n", "")


IMPOSSIBLE = {
    "no command": ([], "Usage: "),
    "an unknown command": (["frobnicate"], "No such command 'frobnicate'"),
    "no name": (["serve", "share"], "Missing option '--name'"),
    "a path for a name": (["serve", "share", "--name", "a/b"], "use 1 to 64 letters, digits, '.', '_' or '-'"),
    "a hidden name": (["serve", "share", "--name", ".."], "not starting with '.'"),
    "no name at all": (["serve", "share", "--name", ""], "use 1 to 64 letters"),
    "slots that are no power of two": (["serve", "share", "--name", "n", "--slots", "1000"], "1024 is the next one"),
    "no slots": (["serve", "share", "--name", "n", "--slots", "0"], "0 is not in the range"),
    "a short lease": (["serve", "share", "--name", "n", "--lease", "0.4"], "between half a second and a minute"),
    "a long lease": (["serve", "share", "--name", "n", "--lease", "61"], "--lease 61 is out of range"),
    "a lease that never ends": (["serve", "share", "--name", "n", "--lease", "inf"], "inf is not in the range"),
    "an unknown danger": (["serve", "share", "--name", "n", "--live-dangerously", "all"], "not one of 'no-bumps', 'no-recalls'"),
    "an unknown table": (["serve", "share", "--name", "n", "--table", "wood"], "not one of 'memfd', 'posix'"),
    "an unknown group": (["serve", "share", "--name", "n", "--group", "no-such-group"], "there is no group"),
    "a share that is a file": (["serve", "file", "--name", "n"], "is not a directory: a share is a directory tree"),
    "a share that is missing": (["serve", "missing", "--name", "n"], "cannot open the share"),
    "a runtime directory in the share": (
        ["serve", "share", "--name", "n", "--runtime-dir", "share/below"], "choose another one with --runtime-dir"),
    "a runtime directory that is the share": (
        ["serve", "share/n", "--name", "n", "--runtime-dir", "share"], "choose another one with --runtime-dir"),
    "a share of everything": (["serve", "/", "--name", "n"], "choose another one with --runtime-dir"),
    "a runtime directory that is a file": (["status", "--runtime-dir", "file"], "is a file"),
    "an unknown mode": (["mount", "n", "point", "--cache", "maybe"], "'maybe' is not one of"),
    "writeback with access": (
        ["mount", "n", "point", "--cache", "access", "--writeback"], "--writeback and --cache access exclude each other",
    ),
    "events with auto": (
        ["mount", "n", "point", "--cache", "auto", "--events"], "--events belongs to --cache access, prompt, strict, not to auto",
    ),
    "writeback with what is usual": (["mount", "n", "point", "--writeback"], "--writeback and --cache strict exclude each other"),
    "danger without grants": (
        ["mount", "n", "point", "--cache", "access", "--live-dangerously", "ack-first"],
        "--live-dangerously belongs to --cache prompt and strict, not to access",
    ),
    "a timeout with none": (["mount", "n", "point", "--cache", "none", "--timeout", "1"], "--timeout belongs to --cache auto"),
    "a timeout with always": (["mount", "n", "point", "--cache", "always", "--timeout", "1"], "--timeout belongs to"),
    "a negative timeout": (["mount", "n", "point", "--cache", "auto", "--timeout", "-1"], "-1.0 is not in the range"),
    "an endless timeout": (["mount", "n", "point", "--cache", "auto", "--timeout", "inf"], "inf is not in the range"),
    "a timeout that is no number": (["mount", "n", "point", "--cache", "auto", "--timeout", "nan"], "nan is not in the range"),
    "a cache without entries": (["mount", "n", "point", "--entries", "0"], "0 is not in the range"),
    "a mount point that is everything": (["mount", "n", "/"], "choose a directory below it"),
    "a guest's name in two lines": (["mount", "n", "point", "--guest", "a\nb"], "--guest is one line of up to 64 bytes"),
    "a guest's name without end": (["mount", "n", "point", "--guest", "x" * 65], "--guest is one line of up to 64 bytes"),
    "a port without its table": (["mount", "n", "point", "--control", "virtio-serial", "--lower", "point"], "belong together"),
    "a table without its port": (["mount", "n", "point", "--table", "pci", "--lower", "point"], "belong together"),
    "a machine without a lower directory": (
        ["mount", "n", "point", "--table", "pci", "--control", "virtio-serial"], "--control virtio-serial needs --lower",
    ),
    "an unknown way to the daemon": (["mount", "n", "point", "--control", "carrier-pigeon"], "--control is socket, virtio-serial or"),
    "a socket with a port": (["mount", "n", "point", "--control", "socket:x"], "--control is socket, virtio-serial or"),
    "a port without a name": (["mount", "n", "point", "--control", "virtio-serial:"], "--control is socket, virtio-serial or"),
    "options for no guest": (["vm-args", "n"], "Missing option '--guest'"),
    "options in no format": (["vm-args", "n", "--guest", "vm1", "--format", "vmx"], "'vmx' is not one of"),
    "the eviction of a guest without a name": (["evict", "n", ""], "EvictRequest.guest: not of 1 to 64 bytes"),
    "forgetting no name": (["forget", "a b"], "is not a name"),
    "a question about no name": (["status", "a b"], "is not a name"),
    "an epoch for no name": (["invalidate", "a b"], "is not a name"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "share/n").mkdir(parents=True)
    (tmp_path / "point").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_a_word_about_it(place: Path, case: str) -> None:
    arguments, message = IMPOSSIBLE[case]
    before = sorted(place.rglob("*"))
    done = coherency(*arguments, COHERENCY_RUNTIME_DIR=str(place / "run"))
    assert done.code == 2, done
    assert message in done.errors
    assert done.output == ""
    assert sorted(place.rglob("*")) == before, "nothing was made"


NOBODY = "coherency: no daemon serves 'n' (nobody is listening); start it with: coherency serve SHARE --name n\n"


@pytest.mark.parametrize(
    "arguments", [["mount", "n", "point"], ["status", "n"], ["status", "n", "--json"], ["invalidate", "n"]]
)
def test_nobody_serves(place: Path, arguments: list[str]) -> None:
    done = coherency(*arguments, "--runtime-dir", place / "run")
    assert (done.code, done.output, done.errors) == (1, "", NOBODY)


@pytest.mark.parametrize(("name", "what"), [("missing", "is not a directory"), ("file", "is not a directory")])
def test_mount_points_that_are_not_there(place: Path, name: str, what: str) -> None:
    done = coherency("mount", "n", name, COHERENCY_RUNTIME_DIR=str(place / "run"))
    assert done.code == 1
    assert f"{place / name} {what}: a mount point must exist (mkdir {place / name})" in done.errors


def test_status_of_nothing(place: Path) -> None:
    done = coherency("status", "--runtime-dir", place / "run")
    assert (done.code, done.output, done.errors) == (0, f"no daemon serves in {place / 'run'}\n", "")
    done = coherency("status", "--json", COHERENCY_RUNTIME_DIR=str(place / "run"))
    assert (done.code, json.loads(done.output), done.errors) == (0, [], "")


def test_the_option_counts_more_than_the_environment(place: Path) -> None:
    done = coherency("status", "--runtime-dir", "here", COHERENCY_RUNTIME_DIR=str(place / "there"))
    assert done.output == "no daemon serves in here\n"

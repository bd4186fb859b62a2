"""What README and operations.md tell people to type is typed here, and prints what they say."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, code_spans, table
from tests.guests import Host

DOCUMENTS = ("README.md", "docs/operations.md")
DEADLINE_S = 120


def script_of(document: Path) -> tuple[str, list[str]]:
    """All blocks marked `run`, in their order, as one shell script; and what they say is printed."""
    script, printed = ["set -e"], []
    for block in blocks(document):
        if "run" not in block.tags:
            continue
        printed += re.findall(r"# prints: (.*)$", block.text, re.MULTILINE)
        script.append(block.text if block.language == "sh" else f"python3 - <<'END'\n{block.text}END")
    return "\n".join(script), printed


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """In `directory`, with `coherency` and `python3` of this very repository, whether it is installed or not."""
    programs = directory / "bin"
    programs.mkdir()
    for name, command in (("coherency", f"{sys.executable} -m coherency"), ("python3", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COHERENCY_RUNTIME_DIR": str(directory / "run"),
    }
    work = directory / "work"
    work.mkdir()
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=work, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = shell.communicate(timeout=DEADLINE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # daemons and mounts that a failed script leaves
    return subprocess.CompletedProcess(script, shell.returncode, output, errors)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_do_what_they_say(document: str, socket_dir: Path) -> None:
    script, printed = script_of(ROOT / document)
    assert len(printed) >= 4, "the blocks were not found"
    result = run(script, socket_dir)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    lines = iter(result.stdout.splitlines())
    assert [wanted for wanted in printed if wanted not in lines] == [], result.stdout  # each after the one before


def test_a_failing_example_fails(socket_dir: Path) -> None:
    assert run("set -e\ncoherency status nobody\ntrue", socket_dir).returncode == 1


def documented(*headings: str) -> list[set[str]]:
    """Keys in the first column of tables with these headings, each document's tables in their order."""
    return [set(code_spans(row[0])) for row in table(ROOT / "docs/operations.md", *headings)]


def test_the_fields_of_a_status_are_the_documented_ones(socket_dir: Path) -> None:
    with Host(socket_dir) as host, host.agent():
        status = host.status()
    (guest,) = status["guests"]
    assert set().union(*documented("field", "meaning")) == status.keys() | guest.keys()

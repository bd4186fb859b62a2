"""A guest in a container: its agent, keeper, helpers and programs have process numbers of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.guests import ROOT, Host

IN_THE_CONTAINER = """
import os, subprocess, sys
from pathlib import Path
runtime_dir, guest, export = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
assert os.getpid() < 100, "a namespace of its own"
agent = subprocess.Popen(
    [sys.executable, "-m", "coherency", "mount", "test", guest, "--guest", "contained", "--runtime-dir", runtime_dir],
    stdout=subprocess.PIPE,
)
assert agent.stdout.readline()
for number in range(5):
    for _ in range(5):
        os.stat(guest / "file")
    os.rename(export / "file", export / "renamed")  # the guest's kernel has the name: a helper drops it
    print(os.path.exists(guest / "file"), os.path.exists(guest / "renamed"))
    os.rename(guest / "renamed", guest / "file")
    os.chmod(export / "file", 0o600 + number)
    print(oct(os.stat(guest / "file").st_mode))
agent.terminate()
print(agent.wait())
"""


def test_names_are_dropped_there_too(make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir()) as host:
        (host.share / "file").write_text("file")
        (host.directory / "guest").mkdir()
        done = subprocess.run(
            ["unshare", "--pid", "--fork", "--mount", "--mount-proc", sys.executable, "-c", IN_THE_CONTAINER,
             host.runtime_dir, host.directory / "guest", host.export],
            capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        expected = [line for number in range(5) for line in ("False True", oct(0o100600 + number))]
        assert done.stdout.splitlines() == [*expected, "0"]
        assert host.status()["recalls"] >= 5
        assert host.status()["evictions"] == 0  # nobody was waited for until the end of a lease

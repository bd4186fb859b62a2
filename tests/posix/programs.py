"""Programs that are run from the file system, and what else is neither a plain file nor a directory."""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.posix.asking import made, mode
from tests.scenarios.comparing import Scenario, UserProcess, as_user, attempt
from tests.scenarios.files import opened

TIMEOUT_S = 30


def program(path: Path, which: str, bits: int = 0o755) -> Path:
    """A copy of a program of this machine."""
    shutil.copyfile(shutil.which(which) or which, path)
    path.chmod(bits)
    return path


def run(*command: Any, **options: Any) -> str:
    words = [os.fspath(word) for word in command]
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_S, **options)
    return str(result.stdout)


def start(*command: Any) -> Any:
    """0, or why it cannot be run."""
    return attempt(lambda: subprocess.run(command, check=False, timeout=TIMEOUT_S).returncode)


def programs_run(d: Path) -> None:
    echo = program(d / "echo", "echo")
    assert run(echo, "hello") == "hello\n"
    (d / "script").write_text("#!/bin/sh\necho script $1\n")
    (d / "script").chmod(0o755)
    assert run(d / "script", "one") == "script one\n"
    (d / "interpreted").write_text(f"#!{echo} with\n")  # whose interpreter lies here, too
    (d / "interpreted").chmod(0o755)
    assert run(d / "interpreted") == f"with {d / 'interpreted'}\n"
    (d / "link").symlink_to("echo")
    assert run(d / "link", "by a link") == "by a link\n"
    assert run("./echo", "here", cwd=d) == "here\n"


def what_cannot_be_run(d: Path) -> None:
    program(d / "closed", "true", 0o644)
    made(d / "empty", 0o755)
    made(d / "garbage", 0o755, 0, 0, b"\x01\x02\x03")
    made(d / "lost", 0o755, 0, 0, b"#!/no/such/program\n")
    (d / "sub").mkdir()
    answers = {name: start(d / name) for name in ("closed", "empty", "garbage", "lost", "sub", "no", "closed/x")}
    assert answers == {
        "closed": "EACCES", "empty": "ENOEXEC", "garbage": "ENOEXEC", "lost": "ENOENT", "sub": "EACCES", "no": "ENOENT",
        "closed/x": "ENOTDIR",
    }  # fmt: skip
    program(d / "ours", "true", 0o710)
    assert as_user(d, lambda: start("./ours")) == "EACCES"
    assert as_user(d, lambda: start("./ours"), groups=[0]) == 0  # to be run without being read


def set_id_programs_run_as_their_owner(d: Path) -> None:
    program(d / "id", "id")
    os.chown(d / "id", 1005, 1006)
    for bits, expected in ((0o755, "1001 1002"), (0o4755, "1005 1002"), (0o2755, "1001 1006"), (0o6755, "1005 1006")):
        os.chmod(d / "id", bits)
        got = as_user(d, lambda: run("./id", "-u").strip() + " " + run("./id", "-g").strip())
        assert (oct(bits), got) == (oct(bits), expected)


def a_running_program_is_not_written(d: Path) -> None:
    sleep = program(d / "sleep", "sleep")
    with subprocess.Popen([sleep, "60"]) as process:
        try:
            answers = [
                attempt(os.open, sleep, os.O_WRONLY), attempt(os.open, sleep, os.O_RDWR), attempt(os.truncate, sleep, 0),
                attempt(os.open, sleep, os.O_WRONLY | os.O_TRUNC), attempt(os.open, sleep, os.O_WRONLY | os.O_CREAT),
            ]  # fmt: skip
            assert answers == ["ETXTBSY"] * 5
            os.close(os.open(sleep, os.O_RDONLY))
            os.chmod(sleep, 0o700)
            os.rename(sleep, d / "moved")
            os.unlink(d / "moved")
            program(d / "sleep", "true")  # another file under this name
            assert start(sleep) == 0
            assert process.poll() is None
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


def what_is_written_is_not_run(d: Path) -> None:
    true = program(d / "true", "true")
    with opened(true, os.O_WRONLY):
        assert start(true) == "ETXTBSY"
    with opened(true, os.O_RDONLY):
        assert start(true) == 0
    (d / "script").write_text("#!/bin/sh\nexit 7\n")
    (d / "script").chmod(0o755)
    with opened(d / "script", os.O_RDWR):
        assert start(d / "script") == "ETXTBSY"
    assert start(d / "script") == 7


def run_by_descriptor(d: Path) -> None:
    """Without a name, too."""
    true = program(d / "false", "false")
    with opened(true, os.O_RDONLY) as fd:
        os.unlink(true)
        child = os.fork()
        if child == 0:
            try:
                os.execve(fd, ["false"], {})
            finally:
                os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def libraries_are_loaded(d: Path) -> None:
    """By mapping them to be executed."""
    ctypes.CDLL("libm.so.6")
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    shutil.copyfile(next(path for path in mapped if "/libm.so" in path), d / "libm.so")
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).sqrt; f.restype = ctypes.c_double; print(f(ctypes.c_double(9.0)))"
    assert run(sys.executable, "-S", "-c", code, d / "libm.so") == "3.0\n"


def pipes_with_a_name(d: Path) -> None:
    os.mkfifo(d / "fifo", 0o666)
    os.chmod(d / "fifo", 0o666)
    assert attempt(os.open, d / "fifo", os.O_WRONLY | os.O_NONBLOCK) == "ENXIO"  # nobody reads

    def work() -> None:
        signal.alarm(TIMEOUT_S)
        with open("fifo", "wb") as pipe:  # waits until somebody reads
            pipe.write(b"through " * 20_000)

    writer, received = UserProcess(d, work), b""
    with opened(d / "fifo", os.O_RDONLY | os.O_NONBLOCK) as reading:
        while len(received) < 160_000 and select.select([reading], [], [], TIMEOUT_S)[0]:
            with contextlib.suppress(BlockingIOError):
                received += os.read(reading, 65536)
        assert writer.result() is None
        assert (received, os.read(reading, 9)) == (b"through " * 20_000, b"")
    status = os.lstat(d / "fifo")
    assert (stat.S_ISFIFO(status.st_mode), status.st_size) == (True, 0)
    with opened(d / "fifo", os.O_RDONLY | os.O_NONBLOCK) as reading:
        writing = os.open(d / "fifo", os.O_WRONLY)
        os.rename(d / "fifo", d / "moved")
        os.unlink(d / "moved")
        os.write(writing, b"x")
        assert os.read(reading, 9) == b"x"
        assert attempt(os.read, reading, 9) == "EAGAIN"
        os.close(writing)
        assert os.read(reading, 9) == b""
        assert attempt(os.lseek, reading, 0, os.SEEK_SET) == "ESPIPE"


def sockets_with_a_name(d: Path) -> None:
    with opened(d, os.O_RDONLY) as at:
        address = f"/proc/self/fd/{at}/socket"  # short enough
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            assert stat.S_ISSOCK(os.lstat(d / "socket").st_mode)
            os.chmod(d / "socket", 0o600)
            with socket.socket(socket.AF_UNIX) as calling:
                assert attempt(calling.connect, address) == "ECONNREFUSED"  # nobody listens yet
            listening.listen()
            with socket.socket(socket.AF_UNIX) as another:
                assert attempt(another.bind, address) == "EADDRINUSE"
            assert as_user(d, lambda: socket.socket(socket.AF_UNIX).connect("socket")) == "EACCES"
            os.chmod(d / "socket", 0o666)

            def work() -> bytes:
                with socket.socket(socket.AF_UNIX) as calling:
                    calling.connect("socket")
                    calling.sendall(b"hello")
                    return calling.recv(9)

            child = os.fork()
            if child == 0:
                os._exit(0 if as_user(d, work) == b"HELLO" else 1)
            listening.settimeout(TIMEOUT_S)
            answering, _ = listening.accept()
            with answering:
                answering.settimeout(TIMEOUT_S)
                answering.sendall(answering.recv(9).upper())
            assert os.waitpid(child, 0)[1] == 0
        with socket.socket(socket.AF_UNIX) as calling:
            assert attempt(calling.connect, address) == "ECONNREFUSED"
        assert attempt(os.open, d / "socket", os.O_RDWR) == "ENXIO"
        os.unlink(d / "socket")


def devices_have_numbers(d: Path) -> None:
    for kind, device in ((stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(4095, 1048575)), (stat.S_IFCHR, 0)):
        os.mknod(d / "node", kind | 0o640, device)
        status = os.lstat(d / "node")
        assert (stat.S_IFMT(status.st_mode), mode(d / "node"), status.st_rdev, status.st_size) == (kind, 0o640, device, 0)
        os.unlink(d / "node")
    assert attempt(os.mknod, d / "node", stat.S_IFDIR | 0o755) == "EPERM"


def special_files_have_attributes_like_others(d: Path) -> None:
    os.mkfifo(d / "fifo")
    os.mknod(d / "node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for name in ("fifo", "node"):
        os.chown(d / name, 5, 6)
        os.chmod(d / name, 0o604)
        os.utime(d / name, ns=(1_000, 2_000))
        os.link(d / name, d / (name + "2"))
        status = os.lstat(d / (name + "2"))
        assert (status.st_uid, status.st_gid, mode(d / name), status.st_mtime_ns, status.st_nlink) == (5, 6, 0o604, 2_000, 2)
        os.setxattr(d / name, "trusted.a", b"value")
        assert os.getxattr(d / (name + "2"), "trusted.a") == b"value"
        assert attempt(os.setxattr, d / name, "user.a", b"") == "EPERM"


SCENARIOS: list[Scenario] = [
    programs_run, what_cannot_be_run, set_id_programs_run_as_their_owner, a_running_program_is_not_written,
    what_is_written_is_not_run, run_by_descriptor, libraries_are_loaded, pipes_with_a_name, sockets_with_a_name,
    devices_have_numbers, special_files_have_attributes_like_others,
]  # fmt: skip

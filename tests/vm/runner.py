"""The program that runs in a guest, and does what the host asks for: python -m tests.vm.runner PORT

1. Each request runs in a thread of its own: a call that waits, or never comes back, stops no other.
2. An exception goes back to the host as it is, or as text if it cannot travel.
3. The end of the port is the end of the program, and of the guest.
"""

import os
import sys
import threading
import traceback
from pathlib import Path

from tests.vm.frames import READY, Answer, Request, messages, pack


def device_of(port: str) -> str:
    """The device of a virtio-serial port, by the name that the host gave it."""
    for directory in Path("/sys/class/virtio-ports").iterdir():
        name = directory / "name"
        if name.exists() and name.read_text().strip() == port:
            return f"/dev/{directory.name}"
    raise FileNotFoundError(f"no virtio-serial port is called {port}")


class Runner:
    def __init__(self, fd: int) -> None:
        self._fd, self._sending = fd, threading.Lock()

    def serve(self) -> None:
        self._send(pack(READY))
        for request in messages(lambda size: os.read(self._fd, size)):
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request: Request) -> None:
        try:
            answer = Answer(request.number, request.function(*request.arguments), None)
        except BaseException as problem:  # noqa: BLE001 - it is the host's, who gets it
            problem.add_note("in the guest:\n" + traceback.format_exc())
            answer = Answer(request.number, None, problem)
        try:
            packed = pack(answer)
        except Exception:  # noqa: BLE001 - whatever pickling raises
            packed = pack(Answer(request.number, None, RuntimeError(f"{answer!r}\n{traceback.format_exc()}")))
        self._send(packed)

    def _send(self, packed: bytes) -> None:
        with self._sending:
            while packed:
                packed = packed[os.write(self._fd, packed) :]


if __name__ == "__main__":
    Runner(os.open(device_of(sys.argv[1]), os.O_RDWR | os.O_CLOEXEC)).serve()

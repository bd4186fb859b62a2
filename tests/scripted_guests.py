"""Guests that are a socket and what the test makes them say: no kernel, no cache, no thread unless asked for."""

import contextlib
import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from coherency.ids import GrantKey
from coherency.protocol import (
    Ack,
    Confirm,
    Goodbye,
    Hello,
    Message,
    Recall,
    Register,
    Release,
    Renew,
    Statistics,
    StatisticsRequest,
    Welcome,
    encode,
)
from coherency.protocol_stream import Decoder

PATIENCE_S = 20.0
Kind = TypeVar("Kind", bound=Message)


class ScriptedGuest:
    """Connected and welcomed when the constructor returns.  A context manager that says goodbye."""

    def __init__(self, path: Path, mode: str = "strict", *, former: int = 0, name: str = "scripted") -> None:
        """`path`: of the control socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        self.sock.settimeout(PATIENCE_S)
        self._decoder = Decoder()
        self._heard: list[Message] = []
        self._serial = 0
        self._acker: threading.Thread | None = None
        self.recalls: list[Recall] = []
        """What `ack_everything` has acked."""
        self.say(Hello(name=name, pid=os.getpid(), mode=mode, former=former))
        self.welcome = self.hear(Welcome)
        self.session = self.welcome.session

    def say(self, *messages: Message) -> None:
        self.sock.sendall(b"".join(map(encode, messages)))

    def next(self) -> Message | None:
        """The next message; None when the daemon has hung up.  Questions for statistics are answered on the way."""
        while True:
            while not self._heard:
                try:
                    data = self.sock.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return None
                self._heard += self._decoder.feed(data)
            message = self._heard.pop(0)
            if not isinstance(message, StatisticsRequest):
                return message
            self.say(Statistics(message.serial, 0, 0, 0, 0, 0))

    def hear(self, kind: type[Kind]) -> Kind:
        """The next message, which must be of this kind."""
        message = self.next()
        assert isinstance(message, kind), message
        return message

    def hears_nothing(self) -> bool:
        """Whether nothing has come that was sent before now.  Ask only when the daemon cannot be about to send something."""
        self.sock.setblocking(False)
        try:
            self._heard += self._decoder.feed(self.sock.recv(65536))
        except BlockingIOError:
            pass
        finally:
            self.sock.settimeout(PATIENCE_S)
        return not [message for message in self._heard if not isinstance(message, StatisticsRequest)]

    def register(self, *keys: GrantKey) -> Confirm:
        self._serial += 1
        self.say(Register(self.session, self._serial, keys))
        confirm = self.hear(Confirm)
        assert (confirm.session, confirm.serial) == (self.session, self._serial)
        return confirm

    def release(self, *keys: GrantKey) -> None:
        self.say(Release(self.session, keys))

    def hear_recall(self) -> Recall:
        recall = self.hear(Recall)
        assert recall.session == self.session
        return recall

    def ack(self, serial: int) -> None:
        self.say(Ack(self.session, serial))

    def renew(self) -> None:
        self._serial += 1
        self.say(Renew(self.session, self._serial))

    def ack_everything(self) -> None:
        """From now on a thread acks each recall at once, until the connection ends."""
        self._acker = threading.Thread(target=self._ack_everything, daemon=True)
        self._acker.start()

    def _ack_everything(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self.next()) is not None:
                if isinstance(message, Recall):
                    self.recalls.append(message)
                    self.ack(message.serial)

    def vanish(self) -> None:
        """The connection ends, and nobody says goodbye."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        if self._acker is not None:
            self._acker.join()
        self.sock.close()

    def goodbye(self) -> None:
        with contextlib.suppress(OSError):
            self.say(Goodbye())
        self.vanish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.goodbye()

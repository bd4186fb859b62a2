"""What the commands that stay have in common: they run until a signal comes, and log."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Final, Protocol

import click

from coherency.errors import CoherencyError

_LOOK_EVERY_S: Final = 0.2

verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Log what happens to standard error, not only what is wrong."
)


class Mounted(Protocol):
    """What runs."""

    def start(self) -> None: ...
    def wait(self, timeout_s: float | None = None) -> bool:
        """Until somebody unmounts it; false after the timeout."""


def log_to_stderr(verbose: bool) -> None:
    """From now on."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def run_until_signal(thing: Mounted, ready: str, close: Callable[[], None], second: threading.Event) -> None:
    """In the foreground until a signal comes, or somebody unmounts it. Another signal while it is closed sets ``second``."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: second.set() if stop.is_set() else stop.set())
    thing.start()
    try:
        click.echo(ready)
        unmounted = False
        while not unmounted and not stop.wait(_LOOK_EVERY_S):
            unmounted = thing.wait(0)
    finally:
        close()
    if unmounted:
        raise CoherencyError("somebody else has unmounted it: stopped")

"""Small file systems for a test to fill: made in a sparse file and mounted; needs root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.mounts import detach

TIMEOUT_S = 60


def run(*command: str | Path) -> None:
    """Fails with what it complains of."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"


@contextlib.contextmanager
def tmpfs(at: Path, options: str) -> Iterator[None]:
    """An empty tmpfs on the directory."""
    run("mount", "-t", "tmpfs", "-o", options, "none", at)
    try:
        yield
    finally:
        detach(at)


@contextlib.contextmanager
def disk(kind: str, at: Path, size_bytes: int, *options: str) -> Iterator[None]:
    """An empty file system of this kind, made with these options of its mkfs, on the directory."""
    image = at.parent / f"{at.name}.{kind}"
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    run(f"mkfs.{kind}", "-q", *options, image)
    run("mount", "-t", kind, "-o", "loop", image, at)
    try:
        yield
    finally:
        detach(at)
        image.unlink()

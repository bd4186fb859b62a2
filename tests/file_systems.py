"""File systems of a chosen kind, made for a test in a sparse file and mounted; needs root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.mounts import detach

_BYTES = {"ext4": 64 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}
"""XFS refuses to be smaller. The files are sparse."""
_TIMEOUT_S = 60


@contextlib.contextmanager
def mounted(
    kind: str, at: Path, options: str = "", *, size_bytes: int | None = None, make: tuple[str, ...] = ()
) -> Iterator[Path]:
    """A new file system of this kind on the directory ``at``, made with the options ``make`` of its mkfs.

    tmpfs needs no file, overlay takes its layers from ``options``.
    """
    image = at.parent / f"{at.name}.{kind}"
    arguments = ["-t", kind, "none"]
    if kind in _BYTES:
        with open(image, "wb") as file:
            file.truncate(size_bytes or _BYTES[kind])
        run(f"mkfs.{kind}", "-q", *make, image)
        arguments = ["-t", kind, "-o", "loop", str(image)]
    if options:
        arguments += ["-o", options]
    run("mount", *arguments, at)
    try:
        yield at
    finally:
        detach(at)
        image.unlink(missing_ok=True)


def run(*command: str | Path) -> str:
    """What it prints. Fails with what it complains of."""
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT_S
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout

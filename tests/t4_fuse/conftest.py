"""Mounts of a passthrough for this level."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.fuse.replies import FOREVER_NS
from tests.passthrough import Served, serve

FOREVER = {"entry_ns": FOREVER_NS, "attr_ns": FOREVER_NS, "keep_pages": True, "readdirplus": True}

# What may be different about a mount without its users noticing.
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing-cached": {},
    "all-cached": {"kernel_cache": FOREVER},
    "writeback": {"kernel_cache": {"writeback": True}},
    "by-handle": {"descriptor_limit": 1},
    "by-name": {"descriptor_limit": 1, "handles": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def any_mount(request: pytest.FixtureRequest, make_socket_dir: Callable[[], Path]) -> Iterator[Served]:
    """A passthrough of each variant."""
    with serve(make_socket_dir(), **VARIANTS[request.param]) as served:
        yield served


@pytest.fixture(scope="module")
def plain_mount(make_socket_dir: Callable[[], Path]) -> Iterator[Served]:
    """A passthrough that lets the kernel cache nothing."""
    with serve(make_socket_dir()) as served:
        yield served

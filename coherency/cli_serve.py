"""``coherency serve``."""

from __future__ import annotations

import functools
import grp
import threading
from pathlib import Path
from typing import Final

import click

from coherency.cli_foreground import log_to_stderr, run_until_signal, verbose_option
from coherency.cli_messages import errors_as_messages, finite_seconds, runtime_dir_option
from coherency.daemon.service import DANGERS, Service, ServiceOptions
from coherency.errors import UsageError
from coherency.leases import DEFAULT_LEASE_NS, LONGEST_LEASE_NS, SHORTEST_LEASE_NS
from coherency.shm_abi import MAX_SLOT_COUNT
from coherency.shm_table import DEFAULT_SLOT_COUNT, require_platform

_SECOND_NS: Final = 1_000_000_000
_NO_GROUP: Final = (1 << 32) - 1


def _group(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        number = int(value) if value.isdecimal() and value.isascii() else grp.getgrnam(value).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {value!r}") from None
    if number >= _NO_GROUP:
        raise click.BadParameter(f"{value} is no group: they end before {_NO_GROUP}")
    return number


@click.command("serve")
@click.argument("share", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What guests call the share.")
@runtime_dir_option
@click.option(
    "--table",
    type=click.Choice(["memfd", "posix"]),
    default="memfd",
    show_default=True,
    help="Where the version table lives: sealed anonymous memory, or a POSIX object that stays when the daemon ends, for virtual "
    "machines.",
)
@click.option(
    "--slots",
    type=click.IntRange(1, MAX_SLOT_COUNT),
    default=DEFAULT_SLOT_COUNT,
    show_default=True,
    help="Version words, a power of two; eight bytes each. Fewer cost refreshes, never a stale answer.",
)
@click.option("--group", callback=_group, help="Who else may connect: a group, by name or number. [default: nobody]")
@click.option(
    "--lease",
    type=float,
    callback=finite_seconds,
    default=DEFAULT_LEASE_NS / _SECOND_NS,
    show_default=True,
    help="Seconds that a change waits at most for a guest that caches in its kernel and does not answer.",
)
@click.option(
    "--in-place",
    is_flag=True,
    help="Mount the export over SHARE itself, too, so that programs on the host go through it without knowing.",
)
@click.option(
    "--watch/--no-watch",
    default=None,
    help="See what programs on the host change in SHARE directly, or do not. [default: if the file system allows it]",
)
@click.option(
    "--live-dangerously",
    type=click.Choice(DANGERS),
    help="Never bump a version, or never tell a guest to forget: guests WILL be stale. For demonstrations.",
)
@verbose_option
def serve_command(
    share: Path, name: str, runtime_dir: Path, table: str, slots: int, group: int | None, lease: float, in_place: bool,
    watch: bool | None, live_dangerously: str | None, verbose: bool,
) -> None:  # fmt: skip
    """Serve the directory SHARE until SIGTERM or Ctrl-C.

    Guests reach it through RUNTIME_DIR/NAME: control.sock, table, and export, the mount through which all changes go.

    \b
    coherency serve /srv/share --name work
    coherency serve /srv/share --name work --in-place     # whoever uses /srv/share goes through the daemon
    coherency serve . --name test --runtime-dir /tmp/run
    """
    log_to_stderr(verbose)
    with errors_as_messages():
        require_platform()
        if slots & (slots - 1):
            raise UsageError(f"--slots {slots} is not a power of two; {1 << slots.bit_length()} is the next one")
        lease_ns = round(lease * _SECOND_NS)
        if not SHORTEST_LEASE_NS <= lease_ns <= LONGEST_LEASE_NS:
            raise UsageError(f"--lease {lease:g} is out of range: between half a second and a minute")
        service = Service(
            ServiceOptions(
                share.absolute(), name, runtime_dir.absolute(), posix_table=table == "posix", slot_count=slots, gid=group,
                lease_ns=lease_ns, in_place=in_place, watch=watch, live_dangerously=live_dangerously,
            )
        )  # fmt: skip
        second = threading.Event()
        close = functools.partial(service.close, hurried=second.is_set)
        run_until_signal(service, f"serving {share} as '{name}': guests use {service.directory.export}", close, second)

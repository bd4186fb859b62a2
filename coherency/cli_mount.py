"""``coherency mount``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import click

from coherency.cli_foreground import log_to_stderr, run_until_signal, verbose_option
from coherency.cli_messages import errors_as_messages, finite_seconds, runtime_dir_option
from coherency.errors import UsageError
from coherency.guest_agent.cache import DEFAULT_CAPACITY
from coherency.guest_agent.links import Link
from coherency.guest_agent.mount import DEFAULT_MODE, MODES, GuestMount, MountOptions
from coherency.guest_agent.recalls import DANGERS
from coherency.guest_agent.virtual_machine import VirtualMachine
from coherency.rendezvous import VIRTIO_PORT_NAME
from coherency.shm_table import require_platform

_SECOND_NS: Final = 1_000_000_000


@click.command("mount")
@click.argument("name")
@click.argument("mountpoint", type=Path)  # not click.Path, which asks what is mounted there
@click.option(
    "--cache",
    type=click.Choice(MODES),
    default=DEFAULT_MODE,
    show_default=True,
    help="strict: the kernel believes until it is told to forget, which every change waits for; never stale. "
    "prompt: no change waits, stale until told. access: compare versions each time, never stale. "
    "none: ask the host each time. auto: believe for --timeout. always: believe for ever.",
)
@click.option(
    "--timeout", type=float, callback=finite_seconds, help="Seconds that --cache auto believes what it has. [default: 1]"
)
@click.option(
    "--writeback/--no-writeback", default=False, help="Let the kernel collect writes (none, auto, always only)."
)
@click.option(
    "--entries",
    type=click.IntRange(1),
    default=DEFAULT_CAPACITY,
    show_default=True,
    help="How much the user cache of --cache access, prompt and strict keeps; the least recently used goes.",
)
@click.option(
    "--live-dangerously",
    type=click.Choice(DANGERS),
    help="Take back wrongly what the kernel was allowed: this guest WILL be stale. For demonstrations.",
)
@click.option(
    "--events/--no-events", default=False, show_default=True,
    help="Show programs that watch files (inotify) what other guests and the host do (access, prompt, strict only).",
)  # fmt: skip
@click.option("--guest", help="What the daemon calls this guest. [default: host name and process id]")
@click.option(
    "--lower",
    type=click.Path(path_type=Path),
    help="Where the export is to be seen, if not where the daemon has mounted it: in a virtual machine, the mount of virtiofs.",
)
@click.option(
    "--control",
    default="socket",
    show_default=True,
    metavar="socket|virtio-serial[:PORT]",
    help="How to reach the daemon: by its socket, or from a virtual machine by a virtio-serial port. [default PORT: coherency.0]",
)
@click.option(
    "--table",
    type=click.Choice(["control", "pci"]),
    default="control",
    show_default=True,
    help="Where the version table is: it comes with the control channel, or in a virtual machine by a PCI device (ivshmem).",
)
@runtime_dir_option
@verbose_option
def mount_command(
    name: str, mountpoint: Path, cache: str, timeout: float | None, writeback: bool, entries: int,
    live_dangerously: str | None, events: bool, guest: str | None, lower: Path | None, control: str, table: str,
    runtime_dir: Path, verbose: bool,
) -> None:  # fmt: skip
    """Mount the share NAME on MOUNTPOINT as a guest of its own, until SIGTERM or Ctrl-C.

    \b
    coherency mount work /mnt/a
    coherency mount work /mnt/b --cache auto --timeout 0.5
    coherency mount work /mnt/work --lower /mnt/share --table pci --control virtio-serial   # in a virtual machine
    """
    log_to_stderr(verbose)
    with errors_as_messages():
        require_platform()
        timeout_ns = None if timeout is None else round(timeout * _SECOND_NS)
        guest_mount = GuestMount(
            MountOptions(
                name, mountpoint.absolute(), runtime_dir.absolute(), cache, timeout_ns, writeback, guest, entries,
                danger=live_dangerously or "", events=events, lower=lower and lower.absolute(),
                link=_link_of(name, control, table, lower),
            )
        )  # fmt: skip
        run_until_signal(guest_mount, f"mounted '{name}' on {mountpoint} ({cache})", guest_mount.close, threading.Event())


def _link_of(name: str, control: str, table: str, lower: Path | None) -> Link | None:
    """The way to the daemon that the options of ``mount`` describe; None: its socket. `UsageError` if they contradict each other."""
    kind, _, port = control.partition(":")
    if kind not in ("socket", "virtio-serial") or (port and kind == "socket") or control.endswith(":"):
        raise UsageError(f"--control is socket, virtio-serial or virtio-serial:PORT, not {control!r}")
    if (kind == "virtio-serial") != (table == "pci"):
        raise UsageError("--control virtio-serial and --table pci belong together: the table cannot come by a serial port")
    if kind == "socket":
        return None
    if lower is None:
        raise UsageError("--control virtio-serial needs --lower: where virtiofs has mounted the export in this machine")
    return VirtualMachine(name, port=port or VIRTIO_PORT_NAME)

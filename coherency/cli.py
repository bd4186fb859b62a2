"""The command line: arguments, output, exit codes. What is decided is decided elsewhere.

Exit codes: 0 done (also after SIGTERM or Ctrl-C), 1 something is wrong that the message tells, 2 impossible options.
"""

from __future__ import annotations

import dataclasses
import functools
import grp
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coherency import __version__
from coherency.cli_check import check_command
from coherency.cli_messages import errors_as_messages, finite_seconds, json_option, runtime_dir_option
from coherency.cli_simulate import simulate_command
from coherency.cli_vm import evict_command, forget_command, link_of, vm_args_command
from coherency.daemon.leasing import GRANTING_MODES
from coherency.daemon.service import DANGERS, Service, ServiceOptions
from coherency.demo import Demo, Step
from coherency.errors import CoherencyError, DaemonUnavailable, UsageError
from coherency.guest_agent.cache import DEFAULT_CAPACITY
from coherency.guest_agent.client import fetch_status, invalidate, served_names
from coherency.guest_agent.mount import DEFAULT_MODE, MODES, GuestMount, MountOptions
from coherency.guest_agent.recalls import DANGERS as DANGERS_OF_MOUNT
from coherency.leases import DEFAULT_LEASE_NS, LONGEST_LEASE_NS, SHORTEST_LEASE_NS
from coherency.shm_abi import MAX_SLOT_COUNT
from coherency.shm_table import DEFAULT_SLOT_COUNT, require_platform

_SECOND_NS: Final = 1_000_000_000
_LOOK_EVERY_S: Final = 0.2
_NO_GROUP: Final = (1 << 32) - 1
_GUEST_COLUMNS: Final = ("in", "pid", "cache", "hits", "misses", "refreshes", "host trips", "entries")
_GRANT_COLUMNS: Final = ("keys", "recalls", "unacked", "lease")
_PLACES: Final = {"socket": "local", "serial": "vm"}
_SWITCHED_OFF: Final = {"bumping": "bumps", "recalling": "recalls"}
_WIDE_COLUMNS: Final = 200  # of what is no terminal: a line of the table stays a line

_verbose = click.option(
    "-v", "--verbose", is_flag=True, help="Log what happens to standard error, not only what is wrong."
)


def _log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="coherency")
def main() -> None:
    """Share one directory with several guests: never stale, and without asking the host for what did not change.

    \b
    coherency serve /srv/share --name work         # on the host: the daemon
    coherency mount work /mnt/a                    # a guest on the same machine
    coherency vm-args work --guest vm1             # a virtual machine as a guest: QEMU's options
    coherency status work                          # who is there, hits and refreshes
    coherency demo                                 # see it at work, nothing to prepare
    """


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


@main.command()
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
@_verbose
def serve(
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
    _log_to_stderr(verbose)
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
        _run(service, f"serving {share} as '{name}': guests use {service.directory.export}", close, second)


@main.command()
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
    type=click.Choice(DANGERS_OF_MOUNT),
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
@_verbose
def mount(
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
    _log_to_stderr(verbose)
    with errors_as_messages():
        require_platform()
        timeout_ns = None if timeout is None else round(timeout * _SECOND_NS)
        guest_mount = GuestMount(
            MountOptions(
                name, mountpoint.absolute(), runtime_dir.absolute(), cache, timeout_ns, writeback, guest, entries,
                danger=live_dangerously or "", events=events, lower=lower and lower.absolute(),
                link=link_of(name, control, table, lower),
            )
        )  # fmt: skip
        _run(guest_mount, f"mounted '{name}' on {mountpoint} ({cache})", guest_mount.close, threading.Event())


def _run(thing: Service | GuestMount, ready: str, close: Callable[[], None], second: threading.Event) -> None:
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


@main.command()
@click.argument("name", required=False)
@runtime_dir_option
@json_option
def status(name: str | None, runtime_dir: Path, as_json: bool) -> None:
    """Show the daemon NAME, or all daemons: guests, hits, misses, refreshes, bumps, epoch, table.

    \b
    coherency status
    coherency status work --json
    """
    found: dict[str, dict[str, Any]] = {}
    with errors_as_messages():
        for each in [name] if name else served_names(runtime_dir):
            try:
                found[each] = fetch_status(runtime_dir, each)
            except CoherencyError as error:
                if name:
                    raise
                if not isinstance(error, DaemonUnavailable):  # one that was killed may have left its socket
                    click.echo(f"coherency: {each}: {error}", err=True)
    if as_json:
        documents = list(found.values())
        click.echo(json.dumps(documents[0] if name else documents, indent=2))
        return
    if not found:
        click.echo(f"no daemon serves in {runtime_dir}")
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE_COLUMNS
    for report in found.values():
        _print_status(console, report)


def _print_status(console: Console, report: dict[str, Any]) -> None:
    title = f"[bold]{report['name']}[/bold]  {escape(str(report['share']))} → {escape(str(report['export']))}"
    console.print(title, soft_wrap=True)
    seconds = int(report["uptime_ns"]) // _SECOND_NS
    console.print(
        f"  pid {report['pid']}, up {seconds} s, epoch {report['epoch']}, {report['bumps']} bumps, "
        f"{report['requests']} requests, table {int(report['table_bytes']) // 1024} KiB ({report['table_kind']}, "
        f"{report['slot_count']} slots), {report['nodes']} inodes known",
        soft_wrap=True,
    )
    console.print(
        f"  lease {report['lease_ns'] / _SECOND_NS:g} s, {report['keys_held']} keys held, {report['recalls']} recalls, "
        f"{report['waits']} changes waited {report['waited_ns'] / _SECOND_NS:.3f} s (longest "
        f"{report['longest_wait_ns'] / _SECOND_NS:.3f} s), {report['evictions']} evictions, {report['lost_guests']} lost guests",
        soft_wrap=True,
    )
    if report["held_ns"]:
        console.print(
            f"  [bold yellow]changes are held for up to {report['held_ns'] / _SECOND_NS:.1f} s more[/bold yellow]: the daemon before "
            f"this one was killed, and {report['held_for_guests']} of its guests have not come back",
            soft_wrap=True,
        )
    if report["in_place"] == "uncovered":
        console.print("  [bold yellow]the mount over the share is gone: programs on the host change it directly now[/bold yellow]")
    watching = f"watching {report['watching']}" + (f" ({report['watching_why']})" if report["watching_why"] else "")
    console.print(
        f"  {escape(watching)}, {report['host_events']} events of the host, {report['overflows']} times too many at once",
        soft_wrap=True,
    )
    for what in ("bumping", "recalling"):
        if report[what] != "on":
            console.print(f"  [bold red]{_SWITCHED_OFF[what]} are switched off: guests are stale[/bold red]")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("  guest", overflow="fold")
    granting = any(guest["mode"] in GRANTING_MODES for guest in report["guests"])
    for heading in _GUEST_COLUMNS + (_GRANT_COLUMNS if granting else ()):
        table.add_column(heading, justify="right", no_wrap=True)
    for guest in report["guests"]:
        name = f"  {guest['name']}" + ("" if guest["answered"] else " (silent)")
        numbers = [_PLACES[guest["line"]]]
        numbers += [guest[key] for key in ("pid", "mode", "hits", "misses", "refreshes", "lower_requests", "entries")]
        if granting:
            numbers += [guest[key] for key in _GRANT_COLUMNS[:-1]] + [f"{guest['lease_left_ns'] / _SECOND_NS:.1f} s"]
        table.add_row(escape(name), *map(str, numbers))
    console.print(table if report["guests"] else "  no guests")


@main.command("invalidate")
@click.argument("name")
@runtime_dir_option
@json_option
def invalidate_command(name: str, runtime_dir: Path, as_json: bool) -> None:
    """Begin a new epoch: every guest of NAME fetches afresh whatever it uses next.

    For the day when the share was changed where the daemon could not see it.

    \b
    coherency invalidate work
    """
    with errors_as_messages():
        epoch = invalidate(runtime_dir, name)
    click.echo(json.dumps({"name": name, "epoch": epoch}) if as_json else f"'{name}' is in epoch {epoch} now")


@main.command()
@click.option("--live-dangerously", is_flag=True, help="Switch the recalls off, and see what stale looks like.")
@json_option
def demo(live_dangerously: bool, as_json: bool) -> None:
    """Serve a copy of Python's standard library to two guests, change files in one, and watch the other.

    Needs nothing prepared; makes everything in a temporary directory and removes it.

    \b
    coherency demo
    coherency demo --live-dangerously
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: everything is taken down again
        signal.signal(number, signal.default_int_handler)
    console = Console(stderr=as_json, highlight=False)
    steps: list[Step] = []
    with errors_as_messages(), Demo(live_dangerously=live_dangerously) as scenario:
        for step in scenario.run(lambda text: console.print(f"[dim]{escape(text)}[/dim]")):
            steps.append(step)
            _print_step(console, step)
    stale = sum(step.stale for step in steps)
    if as_json:
        click.echo(json.dumps({"stale": stale, "steps": [dataclasses.asdict(step) for step in steps]}, indent=2))
    if live_dangerously:
        console.print(f"\n[bold red]{stale} stale answers[/bold red]: this is what the recalls are for.")
        sys.exit(0 if stale else 1)
    console.print(
        f"\n[bold red]{stale} stale answers: this must not happen, please report it[/bold red]" if stale
        else "\n[bold green]No stale answer.[/bold green] Now try: coherency demo --live-dangerously"
    )  # fmt: skip
    sys.exit(1 if stale else 0)


def _print_step(console: Console, step: Step) -> None:
    mark = "[bold red]STALE[/bold red]" if step.stale else "[green]ok[/green]   "
    trips = f"{step.host_trips} host trip{'' if step.host_trips == 1 else 's'}"
    console.print(f"{mark} {escape(step.what)}", soft_wrap=True)
    console.print(f"      {escape(step.seen)}  [cyan]{trips}[/cyan], {step.milliseconds:.1f} ms", soft_wrap=True)


main.add_command(check_command)
main.add_command(evict_command)
main.add_command(forget_command)
main.add_command(vm_args_command)
main.add_command(simulate_command)

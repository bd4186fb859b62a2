"""``coherency status``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coherency.cli_messages import errors_as_messages, json_option, runtime_dir_option
from coherency.errors import CoherencyError, DaemonUnavailable
from coherency.guest_agent.mount import GRANTING_MODES
from coherency.guest_agent.requests import fetch_status, served_names

_SECOND_NS: Final = 1_000_000_000
_GUEST_COLUMNS: Final = ("in", "pid", "cache", "hits", "misses", "refreshes", "host trips", "entries")
_GRANT_COLUMNS: Final = ("keys", "recalls", "unacked", "lease")
_PLACES: Final = {"socket": "local", "serial": "vm"}
_SWITCHED_OFF: Final = {"bumping": "bumps", "recalling": "recalls"}
_WIDE_COLUMNS: Final = 200  # of what is no terminal: a line of the table stays a line


@click.command("status")
@click.argument("name", required=False)
@runtime_dir_option
@json_option
def status_command(name: str | None, runtime_dir: Path, as_json: bool) -> None:
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

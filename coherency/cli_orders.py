"""What an operator orders: ``coherency invalidate`` and ``coherency evict``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from coherency.cli_messages import errors_as_messages, json_option, runtime_dir_option
from coherency.guest_agent.requests import evict, invalidate


@click.command("invalidate")
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


@click.command("evict")
@click.argument("name")
@click.argument("guest")
@runtime_dir_option
@json_option
def evict_command(name: str, guest: str, runtime_dir: Path, as_json: bool) -> None:
    """Send a guest of NAME away: GUEST is its name, or its number in status --json.

    It is told to forget everything, and waited for: one lease at most. An agent that is alive comes back by itself, with nothing
    cached; to keep a virtual machine out, shut it down or disconnect its control port.

    \b
    coherency evict work vm1
    """
    with errors_as_messages():
        count = evict(runtime_dir, name, guest)
    if as_json:
        click.echo(json.dumps({"name": name, "guest": guest, "evicted": count}))
    else:
        click.echo(f"evicted {count} guest{'' if count == 1 else 's'} of '{name}'")

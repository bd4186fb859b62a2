"""``coherency demo``."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys

import click
from rich.console import Console
from rich.markup import escape

from coherency.cli_messages import errors_as_messages, json_option
from coherency.demo import Demo, Step


@click.command("demo")
@click.option("--live-dangerously", is_flag=True, help="Switch the recalls off, and see what stale looks like.")
@json_option
def demo_command(live_dangerously: bool, as_json: bool) -> None:
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

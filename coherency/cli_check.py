"""``coherency check``: its arguments and its output."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any, Final

import click

from coherency.cli_messages import errors_as_messages, finite_seconds, json_option
from coherency.sim.litmus import DEFAULT_BOUND_S, Litmus, Tally

_MS: Final = 1_000_000


@click.command("check")
@click.argument(
    "directories", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR_A DIR_B ..."
)
@click.option(
    "--seconds", type=float, callback=finite_seconds, default=5.0, show_default=True, help="How long; each mount has at least one round."
)
@click.option(
    "--bound",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULT_BOUND_S,
    show_default=True,
    help="Seconds after which a change that is not seen counts as never seen.",
)
@json_option
def check_command(directories: tuple[Path, ...], seconds: float, bound: float, as_json: bool) -> None:
    """Change things through one mount of a tree and see how late the other mounts show it.

    For any file systems: guests of ours, virtiofs, NFS, 9p, bind mounts. Works in a directory of its own below the given
    ones, and removes it. Exits with 1 if anything was late. Ctrl-C ends it early, and shows what was found until then.

    \b
    coherency check /mnt/a /mnt/b
    coherency check /mnt/a /mnt/b /mnt/c --seconds 30 --json
    """
    interrupted = False
    with errors_as_messages():
        litmus = Litmus(directories, bound_s=bound)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            litmus.run(seconds, lambda text: click.echo(text, err=True))
        except KeyboardInterrupt:
            interrupted = True
    late = sum(tally.late for tally in litmus.tallies.values())
    if as_json:
        operations = {name: _document(tally) for name, tally in litmus.tallies.items()}
        document = {"late": late, "rounds": litmus.rounds, "interrupted": interrupted, "operations": operations}
        click.echo(json.dumps(document, indent=2))
    else:
        _print(litmus, late, bound)
        if interrupted:
            click.echo(f"interrupted after {litmus.rounds} whole rounds")
    sys.exit(1 if late else 0)


def _print(litmus: Litmus, late: int, bound: float) -> None:
    click.echo(f"{'':18}{'looks':>7}{'late':>7}{'never':>7}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}")
    for name, tally in litmus.tallies.items():
        if tally.unsupported:
            click.echo(f"{name:18}not supported here: {tally.unsupported}")
            continue
        times = "".join(f"{tally.quantile_ns(part) / _MS:10.1f}" for part in (0.5, 0.99, 1.0)) if tally.late_ns else ""
        click.echo(f"{name:18}{tally.looks:7}{tally.late:7}{tally.never:7}{times}")
    if late:
        click.echo(f"{late} looks were late ('never': not within {bound:g} s)")
    elif any(tally.looks for tally in litmus.tallies.values()):
        click.echo("every change was seen at once")
    else:
        click.echo("nothing was looked at")


def _document(tally: Tally) -> dict[str, Any]:
    return {
        "looks": tally.looks,
        "late": tally.late,
        "never": tally.never,
        "p50_ms": tally.quantile_ns(0.5) / _MS,
        "p99_ms": tally.quantile_ns(0.99) / _MS,
        "max_ms": tally.quantile_ns(1.0) / _MS,
        "unsupported": tally.unsupported or None,
    }

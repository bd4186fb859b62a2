"""``coherency simulate``: its arguments and its output."""

from __future__ import annotations

import json
import secrets
import signal
import sys
from typing import Any, Final

import click

from coherency.cli_messages import errors_as_messages, finite_seconds, json_option
from coherency.leases import SHORTEST_LEASE_NS
from coherency.sim.faults import DEFAULT_LEASE_NS, FAULTS, GROUPS, parse_faults
from coherency.sim.machine import MOUNT_DANGEROUSLY, SERVE_DANGEROUSLY, WORKLOADS, Setup
from coherency.sim.run import Outcome, simulate
from coherency.sim.verdict import PROMISES, Violation, describe

_MS: Final = 1_000_000
_SECOND_NS: Final = 1_000_000_000
_SHOWN_VIOLATIONS: Final = 3
_SEEDS: Final = 1_000_000


@click.command("simulate")
@click.option("--guests", type=click.IntRange(1), default=2, show_default=True, help="How many mounts.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    callback=finite_seconds,
    default=10.0,
    show_default=True,
    help="How long they work.",
)
@click.option("--seed", type=int, help="Decides who does what, and which faults happen when. [default: a new one]")
@click.option(
    "--cache", type=click.Choice(tuple(PROMISES)), default="strict", show_default=True, help="The mode of the mounts."
)
@click.option(
    "--faults", default="none", show_default=True, help=f"all, none, or a list of: {', '.join((*GROUPS, *FAULTS))}."
)
@click.option(
    "--workload", type=click.Choice(WORKLOADS), default=WORKLOADS[0], show_default=True,
    help="same-directory: make, rename and remove names in one directory, as fast as it goes.",
)
@click.option(
    "--lease", type=click.FloatRange(SHORTEST_LEASE_NS / _SECOND_NS), default=DEFAULT_LEASE_NS / _SECOND_NS, show_default=True,
    callback=finite_seconds, help="Seconds that the daemon waits for a silent guest, in the modes prompt and strict.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes per guest; half of them change things.",
)
@click.option(
    "--live-dangerously", type=click.Choice((*SERVE_DANGEROUSLY, *MOUNT_DANGEROUSLY)), default=None,
    help="Leave something out that is needed: the check must find what comes of it.",
)
@json_option
def simulate_command(
    guests: int, seconds: float, seed: int | None, cache: str, faults: str, workload: str, lease: float, workers: int,
    live_dangerously: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Let real guests change and look at one directory, break things, and check everything that they saw.

    Starts a daemon and mounts of its own in a temporary directory, and removes them. Needs root and /dev/fuse. Exits with
    1 if a promise of the cache mode was not kept, or a call took longer than anything explains; and shows the shortest
    history that proves it.

    \b
    coherency simulate
    coherency simulate --guests 4 --seconds 60 --seed 7 --faults all
    coherency simulate --cache auto --faults stop,kill-daemon --json
    coherency simulate --workload same-directory --seconds 60
    coherency simulate --live-dangerously no-recalls        # see it find what is wrong
    """
    seed = secrets.randbelow(_SEEDS) if seed is None else seed
    with errors_as_messages():
        kinds = parse_faults(faults)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        setup = Setup(guests, workers, cache, seed, workload, round(lease * _SECOND_NS), live_dangerously or "")
        outcome = simulate(setup, seconds, kinds, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(_document(outcome), indent=2))
    else:
        _print(outcome)
    sys.exit(0 if outcome.passed else 1)


def _print(outcome: Outcome) -> None:
    verdict, setup = outcome.verdict, outcome.setup
    click.echo(
        f"{setup.guests} guests, --cache {setup.cache}, seed {setup.seed}, {outcome.seconds:g} s, {len(outcome.windows)} "
        f"faults: {verdict.calls} calls ({verdict.disturbed} disturbed); {verdict.reads} reads and {verdict.writes} "
        f"writes of {verdict.registers} registers and {verdict.raced} calls of races checked ({verdict.promise.value})"
    )
    click.echo(f"{'longest, ms':18}{'calls':>8}{'quiet':>10}{'at fault':>10}")
    for op, longest in verdict.longest.items():
        times = f"{longest.quiet_ns / _MS:10.1f}{longest.faulty_ns / _MS:10.1f}"
        click.echo(f"{op:18}{longest.calls:8}{times}  {longest.fault}".rstrip())
    stale = verdict.staleness
    if stale.stale:
        click.echo(
            f"stale reads: {stale.stale}; p50 {stale.p50_ns / _MS:.1f} ms, p99 {stale.p99_ns / _MS:.1f} ms, "
            f"max {stale.max_ns / _MS:.1f} ms"
        )
        for bucket, count in stale.histogram.items():
            click.echo(f"  {bucket:>13} {count}")
    else:
        click.echo("stale reads: none")
    for violation in outcome.violations[:_SHOWN_VIOLATIONS]:
        click.echo(f"\nVIOLATION at {violation.where}: {violation.reason}")
        for call in violation.calls:
            click.echo(describe(call, outcome.origin_ns))
        for what in _disturbances(outcome, violation):
            click.echo(f"{what['start_ms']:12.3f} .. {what['end_ms']:12.3f} ms  fault: {what['what']}")
    more = len(outcome.violations) - _SHOWN_VIOLATIONS
    if more > 0:
        click.echo(f"\n... and {more} more violations")
    click.echo("passed" if outcome.passed else f"FAILED: {len(outcome.violations)} violations")


def _disturbances(outcome: Outcome, violation: Violation) -> list[dict[str, Any]]:
    """The faults during the time that a violation is about."""
    if not violation.calls:
        return []
    first, last = violation.calls[0].start_ns, max(call.end_ns for call in violation.calls)
    return [
        each
        for window, each in zip(outcome.windows, _windows(outcome), strict=True)
        if window.start_ns <= last and first <= window.end_ns
    ]


def _windows(outcome: Outcome) -> list[dict[str, Any]]:
    origin = outcome.origin_ns
    return [
        {"what": each.what, "start_ms": (each.start_ns - origin) / _MS, "end_ms": (each.end_ns - origin) / _MS}
        for each in outcome.windows
    ]


def _document(outcome: Outcome) -> dict[str, Any]:
    verdict, origin = outcome.verdict, outcome.origin_ns
    return {
        "passed": outcome.passed,
        "setup": outcome.setup._asdict() | {"seconds": outcome.seconds},
        "promise": verdict.promise.value,
        "calls": verdict.calls,
        "disturbed": verdict.disturbed,
        "reads": verdict.reads,
        "writes": verdict.writes,
        "registers": verdict.registers,
        "raced": verdict.raced,
        "longest": {
            op: {"calls": each.calls, "quiet_ms": each.quiet_ns / _MS, "faulty_ms": each.faulty_ns / _MS, "fault": each.fault or None}
            for op, each in verdict.longest.items()
        },
        "staleness": verdict.staleness._asdict(),
        "faults": _windows(outcome),
        "violations": [
            {
                "where": each.where,
                "reason": each.reason,
                "calls": [
                    call._asdict() | {"start_ns": call.start_ns - origin, "end_ns": call.end_ns - origin}
                    for call in each.calls
                ],
            }
            for each in outcome.violations
        ],
    }

"""What the benchmarks with aims have in common: their options, their exit codes, and how they print what was found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import CouldNotMeasure, load_average
from rounds import end_progress

from coherency.errors import CoherencyError

Document = dict[str, Any]


@dataclass(frozen=True)
class Aim:
    """One of what this project wants to reach, and whether it did."""

    text: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def run(
    description: str,
    measure: Callable[[int], tuple[Document, Sequence[Aim]]],
    print_report: Callable[[Document], None],
    *,
    rounds: int,
    rounds_are: str,
    troubles: tuple[type[Exception], ...] = (),
) -> int:
    """The program; returns its exit code, as the benchmarks' own pages say.

    ``measure`` gets the number of rounds, and returns what is printed or becomes JSON, with "machine" and "rounds" in it, and the
    aims; ``print_report`` prints what stands between these. ``troubles``: what keeps it from measuring, besides the usual.
    """
    program = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"{rounds_are} (default: {rounds})")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of tables")
    parser.add_argument("--strict-aims", action="store_true", help="exit with 3 if an aim is missed")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        document, aims = measure(options.rounds)
    except (CouldNotMeasure, CoherencyError, OSError, *troubles) as error:
        end_progress()
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    end_progress()
    document["machine"] |= {"load average at the end": load_average()}
    document["aims"] = [asdict(aim) | {"met": aim.met} for aim in aims]
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        for name, value in document["machine"].items():
            print(f"{name:24} {value}")
        print_report(document)
        _print_aims(document["aims"])
    return 3 if options.strict_aims and not all(aim.met for aim in aims) else 0


def print_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each row, a column for each figure; all rows have the same."""
    print(f"\n{title}")
    columns = list(next(iter(rows.values())))
    width = max(16, *map(len, rows))
    print("  " + " " * width + "".join(f"{column:>20}" for column in columns))
    for name, row in rows.items():
        print(f"  {name:{width}}" + "".join(f"{row[column]:>20}" for column in columns))


def _print_aims(aims: Sequence[Mapping[str, Any]]) -> None:
    print("\naims")
    for aim in aims:
        value, limit = (format(each, ",d" if isinstance(each, int) else ".2f") for each in (aim["value"], aim["limit"]))
        print(f"  {'met   ' if aim['met'] else 'MISSED'}  {aim['text']}: {value}, at most {limit}")

"""Searches the Promela models of this directory with Spin, and compares each result with the expected one in rows.txt.

Every search is full: no bit-state hashing, no limit of depth; one that does not come to its end is reported as unfinished,
which is never what was expected. Needs spin and gcc.

    python docs/model/check.py [PATTERN] [--quick] [--jobs N] [--timeout S] [--list] [--json] [--keep DIRECTORY] [--record]

Exit codes: 0 all as expected, 1 not, 2 impossible options, 3 spin or gcc is missing or cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROWS, RESULTS = HERE / "rows.txt", HERE / "results.txt"
BASE = {"strict": ("-DNG=1", "-DNR0=1", "-DNR1=1", "-DNW=1", "-DNM=1", "-DL=2"), "keys": ()}
PROPERTIES = ("LIN", "REG", "FRESH", "none", "cycle", "live")
RESULT_OF = {
    "assertion violated": "stale",
    "invalid end state": "stuck",
    "non-progress cycle": "endless",
    "acceptance cycle": "endless",
}
DEEPEST, TABLE_BITS = 200_000, 22


class Unusable(Exception):
    """A program that is needed is missing, or does not accept the model."""


@dataclass(frozen=True)
class Search:
    """One search: a row of rows.txt with one of its sets of properties."""

    name: str
    model: str
    flags: tuple[str, ...]
    properties: str
    expected: str
    quick: bool


@dataclass(frozen=True)
class Found:
    """What came out of it."""

    name: str
    properties: str
    result: str
    expected: str
    states: int
    seconds: float

    @property
    def right(self) -> bool:
        return self.result == self.expected


def read_rows(path: Path) -> Iterator[Search]:
    """All searches of a file of rows; ValueError if a line is none."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 6 or cells[1] not in BASE or cells[4] not in {"pass", *RESULT_OF.values()}:
            raise ValueError(f"{path.name}, line {number}: not a row")
        name, model, flags, searches, expected, quick = cells
        for properties in searches.split(","):
            if not set(properties.strip().split("+")) <= set(PROPERTIES):
                raise ValueError(f"{path.name}, line {number}: not properties: {properties}")
            yield Search(name, model, tuple(flags.split()), properties.strip(), expected, quick == "*")


def defines(search: Search) -> list[str]:
    """Of two flags about the same name the later one counts."""
    names = [name for name in search.properties.split("+") if name in {"LIN", "REG", "FRESH"}]
    extra = ["-DLIVE"] if search.properties == "live" else [f"-D{name}" for name in names]
    return list({flag.partition("=")[0]: flag for flag in (*BASE[search.model], *search.flags, *extra)}.values())


def carry_out(search: Search, directory: Path, timeout_s: float) -> Found:
    """One search, in a directory of its own, where a counterexample is left as ``counterexample.txt``."""
    directory.mkdir(parents=True)
    model = HERE / f"{search.model}.pml"
    compiling, running = {
        "cycle": (["-DNP"], ["-E", "-l"]),  # no state is marked as progress: any cycle is one too many
        "live": (["-DNFAIR=3"], ["-a", "-f", "-E"]),  # with weak fairness
    }.get(search.properties, (["-DSAFETY"], []))
    shutil.copy(model, directory / "model.pml")
    _run(["spin", "-a", *defines(search), "model.pml"], directory)
    # A short search takes less time than optimizing it; a long one would take too much memory without COLLAPSE.
    size = ["-O0"] if search.quick else ["-O1", "-DCOLLAPSE"]
    _run(["gcc", *size, "-w", "-DVECTORSZ=2048", *compiling, "-o", "pan", "pan.c"], directory)
    began = time.monotonic()
    try:
        done = subprocess.run(
            ["./pan", f"-m{DEEPEST}", f"-w{TABLE_BITS}", *running],
            cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        output = done.stdout
    except subprocess.TimeoutExpired:
        output = ""
    states = re.search(r"(\d+) states, stored", output)
    result = judge(output)
    if result != "pass" and (directory / "model.pml.trail").exists():
        trail = _run(["spin", "-t", "-p", "-g", *defines(search), "-k", "model.pml.trail", "model.pml"], directory)
        (directory / "counterexample.txt").write_text(trail)
    for big in ("pan", *(each.name for each in directory.glob("pan.*"))):
        (directory / big).unlink()
    return Found(
        search.name, search.properties, result, search.expected,
        int(states[1]) if states else 0, round(time.monotonic() - began, 1),
    )  # fmt: skip


def judge(output: str) -> str:
    """What a search that printed this has found."""
    errors = re.search(r"errors: (\d+)", output)
    if errors is None:
        return "unfinished"
    if errors[1] != "0":
        error = re.search(r"^pan:\d+: (.*)$", output, re.MULTILINE)
        return next((result for words, result in RESULT_OF.items() if error and words in error[1]), "unfinished")
    return "unfinished" if re.search("not completed|max search depth too small|out of memory", output) else "pass"


def _run(command: list[str], directory: Path) -> str:
    """Run a tool; what it printed. Raises `Unusable` with the end of that, unless it succeeds."""
    try:
        done = subprocess.run(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except FileNotFoundError as error:
        raise Unusable(f"{command[0]} is missing: make model installs it") from error
    if done.returncode:
        raise Unusable(f"{' '.join(command)}\n{done.stdout[-2000:]}")
    return done.stdout


def line_of(found: Found) -> str:
    verdict = "" if found.right else f"   <-- expected: {found.expected}"
    return f"{found.name:<24} {found.properties:<10} {found.states:>10}  {found.result}{verdict}"


def record(results: list[Found]) -> None:
    """Keep what results.txt says of other searches that are still in rows.txt."""
    lines = [line.split() for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    texts = {(name, properties): line for line in lines for name, properties in [line[:2]]}
    new = {(found.name, found.properties): line_of(found) for found in results}
    with RESULTS.open("w") as file:
        for search in read_rows(ROWS):
            key = search.name, search.properties
            if key in new or key in texts:
                print(new.get(key) or f"{key[0]:<24} {key[1]:<10} {texts[key][2]:>10}  {texts[key][3]}", file=file)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only rows of whose 'model name flags' this expression is found")
    parser.add_argument("--quick", action="store_true", help="only the quick selection, of less than two minutes")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="searches at a time")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for one search (default 600)")
    parser.add_argument("--list", action="store_true", help="only say which rows there are")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="leave counterexamples in this new directory")
    parser.add_argument("--record", action="store_true", help="write the results to results.txt")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs: at least 1")
    if arguments.keep is not None and arguments.keep.exists():
        parser.error(f"--keep: {arguments.keep} is there already")
    try:
        arguments.searches = [
            search
            for search in read_rows(arguments.rows)
            if (search.quick or not arguments.quick)
            and re.search(arguments.pattern, " ".join((search.model, search.name, *search.flags)))
        ]
    except (re.error, ValueError, OSError) as error:
        parser.error(str(error))
    if not arguments.searches:
        parser.error("no row matches")
    return arguments


def search_all(searches: list[Search], keep: Path, jobs: int, timeout_s: float) -> list[Found]:
    """All results, in the order of the searches; progress goes to standard error."""
    found: dict[int, Found] = {}
    with ThreadPoolExecutor(jobs) as pool:
        tasks = {
            pool.submit(carry_out, search, keep / f"{search.name}.{search.properties}", timeout_s): index
            for index, search in enumerate(searches)
        }
        try:
            for task in as_completed(tasks):
                found[tasks[task]] = task.result()
                print(f"{len(found):>4}/{len(searches)} {line_of(task.result())}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [found[index] for index in sorted(found)]


def main() -> int:
    arguments = parse()
    if arguments.list:
        for search in arguments.searches:
            quick = "*" if search.quick else " "
            print(f"{search.name:<24} {search.properties:<10} {search.expected:<8} {quick} {' '.join(search.flags)}")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coherency-model-") as scratch:
        try:
            results = search_all(
                arguments.searches, arguments.keep or Path(scratch, "model"), arguments.jobs, arguments.timeout
            )
        except Unusable as error:
            print(error, file=sys.stderr)
            return 3
    wrong = [found for found in results if not found.right]
    if arguments.json:
        print(json.dumps([asdict(found) for found in results], indent=1))
    for found in wrong:
        print(line_of(found), file=sys.stderr)
    print(
        f"{len(results) - len(wrong)} of {len(results)} searches came out as expected, in {time.monotonic() - began:.0f} s",
        file=sys.stderr,
    )
    if arguments.record:
        record(results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

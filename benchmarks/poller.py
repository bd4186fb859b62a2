"""A process that looks at one file again and again, and tells when it saw what. Started by ``sharing``.

    python benchmarks/poller.py FILE

It says ``ready``, looks until its standard input is closed, and prints one JSON document: how often it looked, how long
that took, and for each change of the modification time that it saw the value, when the last look that still found the
old one had begun, and when the first look that found the new one had ended. Times are of the monotonic clock, which all
processes of a machine share.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

_LOOKS_BETWEEN_QUESTIONS = 64


def main() -> int:
    path = sys.argv[1]
    stat, now_ns = os.stat, time.monotonic_ns
    seen, seen_at_ns = stat(path).st_mtime_ns, now_ns()
    changes: list[tuple[int, int, int]] = []
    looks, started_ns = 0, now_ns()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(_LOOKS_BETWEEN_QUESTIONS):
            began_ns = now_ns()
            found = stat(path).st_mtime_ns
            if found != seen:
                changes.append((found, seen_at_ns, now_ns()))
                seen = found
            seen_at_ns = began_ns
        looks += _LOOKS_BETWEEN_QUESTIONS
    print(json.dumps({"looks": looks, "elapsed_ns": now_ns() - started_ns, "changes": changes}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

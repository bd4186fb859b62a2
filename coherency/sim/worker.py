"""One worker of a simulated guest: a process that makes calls on the guest's mount and writes down what came of each.

``python -m coherency.sim.worker ORDERS`` with the orders as JSON. It ends by itself when its time is over. Each line of
its record is one call; what it is busy with stands in a file of its own, for the day when a call does not return. Such a
call is a disturbed one that lasts until the end.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from coherency.sim.actions import Actions
from coherency.sim.calls import (
    CREATES,
    INSIDE,
    RACE,
    TREE,
    Group,
    Names,
    Scene,
    Step,
    after,
    kept_file,
    made_by,
)
from coherency.sim.history import LOST, Call
from coherency.sim.names import UNKNOWN, Entry
from coherency.sim.plots import Plots
from coherency.sim.workload import Kept, Workload, after_kept

_CURRENT_BYTES: Final = 256
# After an error that a fault must have caused: long enough not to fill the record with thousands of them.
_PAUSE_AFTER_ERROR_S: Final = 0.01
# Looks that a kernel answers take microseconds. So many of them at full speed; then the processors are for others.
_LOOKS_AT_ONCE: Final = 20
_REST_S: Final = 0.005
_WAIT_NS: Final = 15_000_000
_POLL_S: Final = 0.0005


@dataclass(frozen=True)
class Orders:
    """What a worker is told. ``looks``: how many, for each change."""

    mount: str
    share: str  # the truth, for what a change of names has made
    groups: str
    record: str
    current: str
    guest: int
    worker: int
    workers: int
    scene: Scene
    seed: str
    looks: int
    until_ns: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Orders:
        fields = json.loads(text)
        scene = Scene(*fields.pop("scene"))
        return cls(**fields, scene=scene._replace(directories=tuple(scene.directories)))


class Worker:
    """Makes calls until its time is over."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._share = orders.share + "/"
        self._actions = Actions(orders.mount)
        self._workload = Workload(Random(orders.seed), orders.scene, worker=orders.worker, workers=orders.workers)
        self._plots = Plots(Path(orders.groups), orders.scene)
        self._current = os.open(orders.current, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def run(self) -> None:
        until_ns, looks = self.orders.until_ns, self.orders.looks
        with open(self.orders.record, "w", buffering=1) as record:  # complete, should a call not return
            turn = 0
            while time.monotonic_ns() < until_ns:
                turn += 1
                if looks >= _LOOKS_AT_ONCE and turn % _LOOKS_AT_ONCE == 0:
                    self._rest()
                call = self._change() if turn % (looks + 1) == 0 else self._look(turn)
                if call is None:
                    continue
                record.write(json.dumps(call) + "\n")
                if call.is_disturbed:
                    time.sleep(_PAUSE_AFTER_ERROR_S)

    def _rest(self) -> None:
        """Let others have the processors; then until something is about to be changed, or for a while."""
        time.sleep(_REST_S)
        news, until_ns = self._plots.news, time.monotonic_ns() + _WAIT_NS
        while self._plots.news == news and time.monotonic_ns() < until_ns:
            time.sleep(_POLL_S)

    def _look(self, turn: int) -> Call:
        """Every other look is at what is being changed."""
        generations = self._plots.generations()
        if turn % 2:
            return self._make(self._workload.look_at(self._plots.announced(), generations))
        return self._make(self._workload.look(generations))

    def _change(self) -> Call | None:
        group = self._workload.pick_group()
        if group is None:
            step = self._workload.change_attribute()
            self._plots.announce(step.path)
            return self._make(step)
        self._plots.announce(group)
        if group.kind == RACE:
            return self._race(group)
        with self._plots.locked(group) as held:
            if held is None:
                return None
            generation, state = held
            if isinstance(state, Kept):
                return self._change_kept(group, generation, state)
            return self._change_names(group, generation, state)

    def _race(self, group: Group) -> Call:
        generation = self._plots.generations()[group]
        step = self._workload.race(self.orders.scene.names_of(group, generation))
        call = self._make(step)
        if step.op in CREATES:
            made = made_by(step, call.result[0] if call.result else None)
            call = call._replace(made=made, result=None)
        if call.is_disturbed:
            self._plots.retire_race(group, generation)
        return call

    # ---- those who hold a group's lock ----

    def _change_names(self, group: Group, generation: int, names: Names) -> Call:
        step = self._workload.change_tree(names) if group.kind == TREE else self._workload.change_name(names)
        if step.path not in names:
            return self._make_inside(group, generation, names, step)
        source = names[step.path]
        call = self._make(step)._replace(source=source, target=names.get(step.other))
        makes = step.op in CREATES or (step.op == "open-create" and source is None)
        if not call.error:
            made = self._entry(step.path) if makes else source
            then = after(step, names, made)
            as_asked = not makes or (made is not None and made == made_by(step, made.ino))
            changed = [path for path in (step.path, step.other) if path in then]
            if as_asked and all(self._entry(path) == _bare(then[path]) for path in changed):
                self._plots.store(group, generation, then)
                return call._replace(made=made if makes else None)
            call = call._replace(error=LOST)
        if call.is_disturbed:
            self._plots.retire(group, generation)
            if makes:
                call = call._replace(made=made_by(step, None))
        return call

    def _make_inside(self, group: Group, generation: int, names: Names, step: Step) -> Call:
        """Of a tree: the file in one of its directories."""
        call = self._make(step)
        made = self._entry(step.path)
        directory = step.path.removesuffix(f"/{INSIDE}")
        entry = names[directory]
        if call.error or made is None or entry is None or made != made_by(step, made.ino):
            self._plots.retire(group, generation)
            return call._replace(error=call.error or LOST, made=made_by(step, None))
        self._plots.store(group, generation, names | {directory: entry._replace(inside=made.ino)})
        return call._replace(made=made)

    def _change_kept(self, group: Group, generation: int, kept: Kept) -> Call:
        path = kept_file(group, generation)
        (name,) = self.orders.scene.names_of(group, generation)
        step = self._workload.change_kept(path, name, kept)
        source = None if step.op == "create" else kept.entry
        call = self._make(step)._replace(source=source)
        if not call.error:
            made = self._entry(path) if step.op == "create" else None
            then = after_kept(step, kept, made)
            if self._is(path, name, then):
                self._plots.store(group, generation, then)
                return call._replace(made=made)
            call = call._replace(error=LOST)
        if call.is_disturbed:
            self._plots.retire(group, generation)
            if step.op == "create":
                call = call._replace(made=made_by(step, None))
        return call

    # ---- the truth ----

    def _entry(self, path: str) -> Entry | None:
        """What the share itself has there."""
        try:
            status = os.lstat(self._share + path)
            return Entry(status.st_mode, status.st_ino, _target(self._share + path, status.st_mode))
        except FileNotFoundError:
            return None

    def _is(self, path: str, name: str, kept: Kept) -> bool:
        """Whether a kept file is, in the share itself, as it should be."""
        status = os.lstat(self._share + path)
        entry = self._entry(name)
        return (
            kept.entry is not None
            and (stat.S_IMODE(status.st_mode), status.st_size, status.st_nlink, status.st_ino)
            == (kept.mode, kept.size, 1 + kept.linked, kept.entry.ino)
            and (entry is not None and entry.ino == status.st_ino if kept.linked else entry is None)
        )

    def _make(self, step: Step) -> Call:
        orders = self.orders
        start_ns = time.monotonic_ns()
        os.pwrite(self._current, json.dumps([start_ns, step]).ljust(_CURRENT_BYTES).encode(), 0)
        start_ns = time.monotonic_ns()
        error, result = self._actions.make(step)
        end_ns = time.monotonic_ns()
        return Call(orders.guest, orders.worker, start_ns, end_ns, step, error, result)


def _bare(entry: Entry | None) -> Entry | None:
    """Without what is inside."""
    return None if entry is None else entry._replace(inside=None)


def _target(path: str, mode: int) -> str | None:
    return os.readlink(path) if Entry(mode).is_link else None


def read_record(path: Path) -> Iterator[Call]:
    """The calls that a worker wrote down. One that it was killed in the middle of is left out."""
    with open(path) as lines:
        for line in lines:
            if line.endswith("\n"):
                yield _call(*json.loads(line))


def endless_call(current: Path, guest: int, worker: int) -> Call:
    """What a worker is still busy with. What it knew of the names is not known here."""
    start_ns, step = json.loads(current.read_text())
    return Call(
        guest, worker, start_ns, time.monotonic_ns(), Step(*step), errno.ETIMEDOUT, None, UNKNOWN, UNKNOWN, UNKNOWN
    )  # fmt: skip


def _call(
    guest: int, worker: int, start_ns: int, end_ns: int, step: list[Any], error: int, result: Any, *entries: Any
) -> Call:
    known = [None if each is None else Entry(*each) for each in entries]
    return Call(guest, worker, start_ns, end_ns, Step(*step), error, result, *known)


def main() -> None:
    os.umask(0)
    Worker(Orders.from_json(sys.argv[1])).run()


if __name__ == "__main__":
    main()

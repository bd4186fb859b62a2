"""A passthrough whose kernel may keep names and attributes for ever, with the helpers that make it forget.

    python -m tests.dropping_server DIRECTORY MOUNTPOINT OPTIONS

Questions and answers as in ``tests.passthrough_server``. Any request can be held: a LOOKUP when its answer is there already,
others before anything has happened.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from coherency.errors import CoherencyError
from coherency.fuse import replies
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import Deferred, Operation, Reply, Session
from coherency.guest_agent.helper_pool import HelperPool
from coherency.ids import HostInode, NodeId
from tests.passthrough_server import answer_questions

FOREVER_NS = 1 << 60


@dataclass(frozen=True)
class Options:
    lies: bool = True  # negative control: false
    proves_locks: bool = True  # negative control: false: whoever waits for the directory's lock is believed to have dropped the name
    cleans: bool = True  # negative control: false: the keeper does not know that anything was granted
    channel: int | None = None  # a descriptor that it inherits: the keeper says goodbye there
    size: int = 4


class Hold:
    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        self.released.wait()


class Granting(Passthrough):
    """Names are granted by LOOKUP, attributes by GETATTR, as long as ``grants`` says so."""

    def __init__(self, root: int) -> None:
        super().__init__(root, descriptor_limit=10_000)
        self.pool: HelperPool | None = None
        self.grants_names = self.grants_attributes = True
        self.lies = True
        self.highest: Callable[[NodeId], None] = lambda node: None
        self.holds: dict[tuple[str, int, bytes], Hold] = {}
        self.seen: list[tuple[str, int, bytes, bool]] = []

    @property
    def operations(self) -> Mapping[int, Operation]:
        return {opcode: self._wrap(operation) for opcode, operation in super().operations.items()}

    def _wrap(self, operation: Operation) -> Operation:
        def wrapped(request: Request) -> Reply | Deferred:
            is_helper = self.pool is not None and self.pool.is_helper(request.pid)
            name = getattr(request.body, "name", b"")
            opcode = Opcode(request.opcode).name
            self.seen.append((opcode, request.node, name, is_helper))
            if is_helper and self.lies:
                assert self.pool is not None
                number = self.pool.lie(request)
                if number is not None:
                    raise OSError(number, "a lie")
            hold = self.holds.get((opcode, request.node, name)) if not is_helper else None
            if hold is None:
                return operation(request)
            if request.opcode == Opcode.LOOKUP:
                answer = operation(request)
                hold.wait()
                return answer
            hold.wait()
            return operation(request)

        return wrapped

    def lookup(self, request: Request) -> Reply:
        parent = self.nodes.get(request.node)
        grant_ns = FOREVER_NS if self.grants_names else 0
        with self.nodes.open(parent) as at:
            node, attr = self.look_up(parent, at, request.body.name)
        return (replies.encode_entry(node.id, attr, grant_ns, 0),)

    def getattr(self, request: Request) -> Reply:
        node = self.nodes.get(request.node)
        grants = self.grants_attributes
        if grants:
            self.highest(node.id)
        with self.nodes.open(node) as fd:
            return (replies.encode_attr_out(self.attributes(node, fd), FOREVER_NS if grants else 0),)


class Server:
    """What can be asked: every method. Paths are relative to the directory."""

    def __init__(self, directory: str, mountpoint: str, options: Options) -> None:
        self._directory = os.fsencode(directory)
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file_system = Granting(root)
        self._file_system.lies = options.lies
        self._session = Session.mount(mountpoint, self._file_system, source="coherency:test", name="test")
        self._session.start()
        self._pool = self._file_system.pool = HelperPool.start(self._session, mountpoint, size=options.size)
        if options.cleans:
            self._file_system.highest = self._pool.granted_up_to
        if not options.proves_locks:
            setattr(self._pool, "_holders", lambda directory: frozenset([0]))  # noqa: B010
        if options.channel is not None:
            self._pool.share_channel(options.channel)
            os.close(options.channel)
        self._drops: list[tuple[threading.Thread, list[bool]]] = []

    def _node(self, path: bytes) -> NodeId:
        nodes = self._file_system.nodes
        ino = os.lstat(os.path.join(self._directory, path)).st_ino
        return nodes._by_key[nodes.root_device, HostInode(ino)].id

    def node_of(self, path: str) -> int:
        return self._node(os.fsencode(path))

    def _names(self, paths: list[str]) -> list[tuple[NodeId, bytes, NodeId]]:
        parts = [(os.path.split(path), path) for path in map(os.fsencode, paths)]
        return [(self._node(parent), name, self._child(path)) for (parent, name), path in parts]

    def _child(self, path: bytes) -> NodeId:
        try:
            return self._node(path)
        except (KeyError, FileNotFoundError):  # the kernel knows what was called so before
            return NodeId(0)

    def drop(self, *paths: str, deadline_s: float = 10.0) -> bool:
        return self._pool.drop(self._names(list(paths)), deadline_s)

    def drop_within(self, deadline_s: float, *paths: str) -> bool:
        return self._pool.drop(self._names(list(paths)), deadline_s)

    def drop_names(self, names: list[tuple[int, str, int]], deadline_s: float) -> bool:
        given = [(NodeId(parent), os.fsencode(name), NodeId(child)) for parent, name, child in names]
        return self._pool.drop(given, deadline_s)

    def begin_drop(self, *paths: str) -> int:
        """Returns the number to ask for its outcome with."""
        names = self._names(list(paths))
        outcome: list[bool] = []
        thread = threading.Thread(target=lambda: outcome.append(self._pool.drop(names, 20.0)), daemon=True)
        thread.start()
        self._drops.append((thread, outcome))
        return len(self._drops) - 1

    def outcome(self, number: int, within_s: float = 20.0) -> bool | None:
        """Of a drop; None: it is under way."""
        thread, outcome = self._drops[number]
        thread.join(within_s)
        return outcome[0] if outcome else None

    def time_drops(self, count: int, *paths: str) -> list[int]:
        """Nanoseconds of each of so many drops; the names are looked up before each."""
        mounted = [os.path.join(os.fsencode(self._session.mountpoint), os.fsencode(path)) for path in paths]
        took = []
        for _ in range(count):
            for path in mounted:
                os.stat(path)
            names = self._names(list(paths))
            began = time.perf_counter_ns()
            assert self._pool.drop(names, 10.0)
            took.append(time.perf_counter_ns() - began)
        return took

    # ---- what is held ----

    def hold(self, opcode: str, directory: str, name: str) -> None:
        """Of the next requests of that kind about a name in a directory; or about the directory itself, if the name is empty."""
        self._file_system.holds[opcode, self._node(os.fsencode(directory)), os.fsencode(name)] = Hold()

    def is_held(self, opcode: str, directory: str, name: str, within_s: float = 20.0) -> bool:
        key = opcode, self._node(os.fsencode(directory)), os.fsencode(name)
        return self._file_system.holds[key].reached.wait(within_s)

    def release(self, opcode: str, directory: str, name: str) -> None:
        key = opcode, self._node(os.fsencode(directory)), os.fsencode(name)
        self._file_system.holds.pop(key).released.set()

    def release_all(self) -> None:
        while self._file_system.holds:
            self._file_system.holds.popitem()[1].released.set()

    def grant(self, names: bool, attributes: bool) -> None:
        self._file_system.grants_names, self._file_system.grants_attributes = names, attributes

    def seen(self) -> list[tuple[str, int, str, bool]]:
        """Requests since the last time: what, node, name, whether a helper's."""
        seen, self._file_system.seen = self._file_system.seen, []
        return [(opcode, node, os.fsdecode(name), is_helper) for opcode, node, name, is_helper in seen]

    def helpers_sleep_in(self) -> list[str]:
        """The kernel functions in which helpers with a job sleep."""
        helpers = list(self._pool._by_pid.values())
        return sorted(helper.sleeps_in().decode() for helper in helpers if helper.job is not None)

    def begin_invalidate_entry(self, parent: int, name: str) -> None:
        notifying = threading.Thread(
            target=self._session.invalidate_entry, args=(NodeId(parent), os.fsencode(name)), daemon=True
        )
        notifying.start()
        self._notifier = notifying.native_id

    def notifier_sleeps_in(self) -> str:
        with open(f"/proc/self/task/{self._notifier}/wchan") as file:
            return file.read()

    # ---- processes ----

    def helpers(self) -> list[int]:
        return sorted(self._pool._by_pid)

    def order_helper(self) -> None:
        with self._pool._lock:
            self._pool._order_helper()

    def ordered_helpers(self) -> int:
        """Not born yet."""
        return self._pool._starting

    def keeper(self) -> int:
        assert self._pool._keeper is not None
        return self._pool._keeper.pid

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def busy_helpers(self) -> list[int]:
        return [pid for pid, helper in self._pool._by_pid.items() if helper.job is not None]

    def share_connection(self, address: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            self._pool.share_channel(connection.fileno())

    def share_nothing(self) -> None:
        self._pool.share_channel(None)

    def granted_up_to(self, node: int) -> None:
        self._pool.granted_up_to(NodeId(node))

    def close_helpers(self) -> None:
        self._pool.close()

    def start_another_without(self, what: str) -> str:
        """What it raises to start another pool when there is no such thing."""
        executable, sys.executable = sys.executable, "/nonexistent" if what == "python" else "/bin/true"
        try:
            HelperPool.start(self._session, self._session.mountpoint)
        except CoherencyError as error:
            return repr(error)
        finally:
            sys.executable = executable
        return "nothing"

    def pool(self) -> dict[str, int]:
        self._pool.check()
        return asdict(self._pool.statistics())

    def statistics(self) -> dict[str, int]:
        return {**asdict(self._session.statistics()), "connection": self._session.connection}

    def invalidate_inode(self, node: int) -> bool:
        return self._session.invalidate_inode(NodeId(node))

    def is_over(self, within_s: float = 0) -> bool:
        return self._session.wait(within_s)

    def close(self) -> None:
        self._pool.close()
        self._session.close()


def main() -> None:
    directory, mountpoint, options = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    answer_questions(Server(directory, mountpoint, Options(**json.loads(options))))


if __name__ == "__main__":
    main()

"""Rows of the bump matrix, played and looked at: these functions are called in guests, and on the host.

Under software emulation a look at everything takes a second, so a guest is asked only what a row changes. What that is, a
rehearsal on a plain directory tells.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.bump_matrix.calls import CALLS, Change, Place, Refused
from tests.bump_matrix.ground import NAMES, Attributes, KernelView, differences, lay, look

NEEDS_A_DAEMON = {"setattr-partial": ["lstat setid"]}
"""Rows that cannot be rehearsed: what is refused in the middle is a request, of which there is none on a plain directory."""

_playing: dict[Path, Change] = {}


def begin(row: str, tree: Path) -> bool:
    """What comes before the observers' first look; False if the file system cannot do that at all."""
    _playing[tree] = CALLS[row](Place(tree, tree, None))
    return go_on(tree)


def go_on(tree: Path) -> bool:
    """The change, and False likewise."""
    try:
        next(_playing[tree], None)
    except Refused:
        return False
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # virtiofsd knows no O_TMPFILE
            raise
        return False
    return True


def end(tree: Path) -> None:
    """What is open is closed."""
    if tree in _playing:
        _playing.pop(tree).close()


def answers(questions: Iterable[str], tree: Path) -> dict[str, Any]:
    """What the kernel of this machine says to them: answers, or names of errors."""
    view = KernelView(tree)
    verbs: dict[str, Callable[..., Any]] = {
        "lstat": lambda name: Attributes.of(view.lstat(name)),
        "stat": lambda name: Attributes.of(view.stat(name)),
        "scandir": lambda name: sorted(view.entries(name)),
        "listdir": lambda name: sorted(view.listdir(name)),
        "readlink": view.readlink,
        "getxattr": view.getxattr,
        "listxattr": lambda name: sorted(os.listxattr(tree / name)),
        "read": lambda name: (tree / name).read_bytes(),
    }
    said: dict[str, Any] = {}
    for question in questions:
        verb, *arguments = question.split(" ")
        try:
            said[question] = verbs[verb](*arguments)
        except OSError as error:
            said[question] = errno.errorcode[error.errno or 0]
    return said


def answers_of_all(questions: list[str], trees: Iterable[Path]) -> list[dict[str, Any]]:
    """Of several trees."""
    return [answers(questions, tree) for tree in trees]


def answers_to(asked: Iterable[tuple[list[str], Path]]) -> list[dict[str, Any]]:
    """To questions of several trees, to each its own."""
    return [answers(questions, tree) for questions, tree in asked]


def what_changes(row: str, tree: Path) -> list[str]:
    """The questions whose answers this row changes; found out in the empty directory `tree`, on the host."""
    if row in NEEDS_A_DAEMON:
        return NEEDS_A_DAEMON[row]
    lay(tree)
    begin(row, tree)
    before = _everything(tree)
    go_on(tree)
    after = _everything(tree)
    end(tree)
    changed = {question.partition(":")[0] for question in differences(before, after)}
    # What has become a device (a whiteout) can be looked at and not opened on a mount: that is no question of coherence.
    asked = changed - {f"read {name}" for name in NAMES if _is_device(tree / name)}
    # Of what says the same twice, once is enough: of a file that is no link, and of a listing.
    asked -= {f"stat {name}" for name in NAMES if f"lstat {name}" in asked and not (tree / name).is_symlink()}
    asked -= {f"listdir {name}" for name in NAMES if f"scandir {name}" in asked}
    # Attributes last: reading makes a kernel fetch them again (atime), and it shall have them when the change comes.
    return sorted(asked, key=lambda question: ("stat " in question, question))


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISCHR(os.lstat(path).st_mode)
    except OSError:
        return False


def _everything(tree: Path) -> dict[str, Any]:
    view = KernelView(tree)
    data = {f"read {name}": content for name, content in view.contents().items()}
    names = {f"listxattr {name}": names for name, names in view.xattr_lists().items()}
    return look(view) | data | names

"""Integer species.  At run time they are plain ints; mypy keeps them from being mixed up."""

from typing import NewType

HostInode = NewType("HostInode", int)
"""`st_ino` of a file as every guest sees it through the export: what a version belongs to."""

NodeId = NewType("NodeId", int)
"""FUSE node id: names an inode between one kernel mount and its server, nowhere else."""

SlotIndex = NewType("SlotIndex", int)
"""Number of a slot of the version table, from 0.  Not an index of a word: the header lies before the slots."""

GrantKey = NewType("GrantKey", int)
"""What a guest registers before its kernel may cache: see `coherency.leases`."""

Version = NewType("Version", int)
"""Value of a slot's word: even when settled, odd while a change is in flight."""

Epoch = NewType("Epoch", int)
"""Value of the table's epoch word: grows when everything must be distrusted."""

"""The states of a VM's disks, as the state file has them: worked out, saved and taken over in one step."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from blkckpt.disk import format as formats
from blkckpt.disk import member, statefile


class States:
    """The disks by name, and their file.  *lock* is held from reading a disk's state to its replacement."""

    def __init__(self, file: statefile.StateFile) -> None:
        self.members: dict[str, member.Member] = {}
        self.file = file
        self.lock = threading.RLock()

    def replace(self, changes: Mapping[str, formats.DiskState]) -> None:
        """Save *changes* (one atomic file replace), then let the disks have them; neither if that fails."""
        self.file.save(changes)
        for name, state in changes.items():
            self.members[name].state = state

"""The disks that the rules of the fast path are tried on: the core and the interpreter's data plane in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import disks, fastcore

MIB = 1 << 20
SIZES = {"vda": 8 * MIB, "vdb": MIB + 1234}
A, B = b"a" * 4096, b"b" * 4096


class Bench:
    """Two disks with the core loaded; ``vda`` has been written to everywhere."""

    hammering = 1.0  # seconds

    def __init__(self, root: Path, core: fastcore.Core) -> None:
        self.core = core
        self.rig = disks.Rig(root, SIZES)
        self.reopened()
        self.vda.pwrite(A * (SIZES["vda"] // 4096), 0)
        self.vdb.pwrite(A, 0)

    def reopened(self) -> None:
        self.vda, self.vdb = (fastcore.Fast(self.core, self.rig.group.disks[name]) for name in SIZES)

    def member(self, name: str = "vda") -> Any:
        return self.rig.group._members[name]

    def top(self) -> Any:
        return self.member().view.layers[0]

    def prepare(self) -> None:
        self.rig.group.prepare("c")

    def switched(self) -> None:
        """To a new overlay whose map pages are there, so that first writes are for the core."""
        self.prepare()
        assert self.rig.group.switch().switched
        self.rig.group.disks["vda"].pwrite(B, SIZES["vda"] - 4096)

    def read(self, block: int) -> bytes:
        buf = bytearray(4096)
        self.vda.pread(buf, block * 4096)
        return bytes(buf)

"""What a disk may hold after a power cut, by what had been asked, acknowledged and flushed before it.

Per 512-byte sector the ledger keeps its versions: content, when the write was issued, when it was acknowledged.
A version *v* may be found after the cut unless it is certain that a later one is durable: some *w*, issued after
*v* was acknowledged, and acknowledged before a flush was issued that was itself acknowledged before the cut (or
*w* itself had FUA).  Nothing else may be found: not zeros that nobody wrote, not another sector's bytes, not half
of one version and half of another (a sector is atomic), not a version from the future.  Time is counted in marks.

This is rules D2 and D3 from the outside: "an unflushed block after power loss is old or new, never zeros".
"""

from __future__ import annotations

from dataclasses import dataclass, field

SECTOR = 512
NEVER = 1 << 62


@dataclass(slots=True)
class Version:
    """One content of one sector; times are numbers of marks in the recorded log."""

    content: bytes
    issued: int
    acknowledged: int = NEVER
    durable: int = NEVER
    """When it became certain to survive: the acknowledgement of a flush that covers it."""


@dataclass(slots=True)
class Request:
    """A write under way: the versions it makes."""

    versions: list[Version]
    fua: bool


@dataclass
class DiskLedger:
    """The versions of all sectors of one disk.  Feed it in log order."""

    sectors: list[list[Version]]
    _requests: dict[int, Request] = field(default_factory=dict)
    _flushes: dict[int, int] = field(default_factory=dict)
    _unflushed: list[Version] = field(default_factory=list)
    """Acknowledged, not yet covered by a flush."""

    @classmethod
    def of(cls, content: bytes) -> DiskLedger:
        """A disk whose durable content is *content*."""
        pieces = (content[at : at + SECTOR] for at in range(0, len(content), SECTOR))
        return cls([[Version(piece, -1, -1, -1)] for piece in pieces])

    @property
    def size(self) -> int:
        return sum(len(versions[-1].content) for versions in self.sectors[-1:]) + SECTOR * (len(self.sectors) - 1)

    def issue(self, now: int, request: int, offset: int, data: bytes, *, fua: bool = False) -> None:
        """A write (of zeros, for zero and trim) is about to be handed to the disk.

        A write that covers a sector in part makes a version out of the newest one: the caller sees to it that no
        other write of that sector is under way.
        """
        versions = []
        at, end = offset, offset + len(data)
        while at < end:
            number, start = divmod(at, SECTOR)
            count = min(SECTOR - start, end - at)
            content = bytearray(self.sectors[number][-1].content)
            content[start : start + count] = data[at - offset : at - offset + count]
            version = Version(bytes(content), now)
            self.sectors[number].append(version)
            versions.append(version)
            at += count
        self._requests[request] = Request(versions, fua)

    def flush_issued(self, now: int, request: int) -> None:
        self._flushes[request] = now

    def acknowledged(self, now: int, request: int) -> None:
        """Request *request* (a write or a flush; no effect if it is another disk's) has been answered."""
        if request in self._requests:
            self._write_acknowledged(now, self._requests.pop(request))
        elif request in self._flushes:
            self._flush_acknowledged(now, self._flushes.pop(request))

    def _write_acknowledged(self, now: int, done: Request) -> None:
        for version in done.versions:
            version.acknowledged = now
            if done.fua:
                version.durable = now
        if not done.fua:
            self._unflushed += done.versions

    def _flush_acknowledged(self, now: int, began: int) -> None:
        rest = []
        for version in self._unflushed:
            if version.acknowledged < began:
                version.durable = now
            else:
                rest.append(version)
        self._unflushed = rest

    def allowed(self, number: int, cut: int) -> list[bytes]:
        """The contents that sector *number* may have after a power cut when *cut* marks were made."""
        versions = [version for version in self.sectors[number] if version.issued < cut]
        floor = max((version.issued for version in versions if version.durable < cut), default=-1)
        return [version.content for version in versions if version.acknowledged >= floor]

    def check(self, content: bytes, cut: int) -> str | None:
        """None if a disk that reads as *content* may come of a power cut at *cut*, else what is wrong."""
        assert len(content) == self.size
        for number, versions in enumerate(self.sectors):
            found = content[number * SECTOR : (number + 1) * SECTOR]
            if len(versions) == 1 and found == versions[0].content:
                continue
            if found not in self.allowed(number, cut):
                return f"sector {number}: {self._describe(number, found, cut)}"
        return None

    def _describe(self, number: int, found: bytes, cut: int) -> str:
        issued = [version.issued for version in self.sectors[number] if version.content == found]
        if any(time < cut for time in issued):
            return f"a version older than the flushed one (issued at {issued}, cut at {cut})"
        if found.count(0) == len(found):
            return f"zeros that nobody wrote (cut at {cut})"
        if issued:
            return f"a version of the future (issued at {issued}, cut at {cut})"
        return f"bytes that nobody wrote here (cut at {cut}): {found[:24].hex()}…"

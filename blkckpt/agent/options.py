"""What the user asks of a checkpoint.  Apart from the agent, so that the command line need not load it to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blkckpt.store import labels

BARRIER = "barrier"
EXPLICIT = "explicit"
AUTO = "auto"
PAUSES = (BARRIER, EXPLICIT, AUTO)


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """What the user asked for.

    *pause*: ``barrier``; ``explicit`` (also for guests that cannot be snapshot in the background); ``auto`` (barrier
    where it works, else explicit).  *keep_memory*: raw memory images of so many of the newest checkpoints are kept
    for lazy restore.  *rate*: bytes a second of the disk copy.  *qmp*: the QMP socket if it is not the VM's own.
    *notes*: sentences to keep in the manifest.  *wait*: seconds to wait for a checkpoint that has its turn.
    *labels*: tags, and whether it is pinned.  *screenshot*: a picture of the guest's screen is kept with it.
    *retain*: the disks are not copied; their frozen layers are kept.
    """

    name: str | None = None
    pause: str = "barrier"
    disks_only: bool = False
    guest_agent: Path | None = None
    rate: int | None = None
    keep_memory: int = 2
    qmp: Path | None = None
    notes: tuple[str, ...] = ()
    wait: float = 0.0
    labels: labels.Labels = labels.NONE
    screenshot: bool = False
    retain: bool = False

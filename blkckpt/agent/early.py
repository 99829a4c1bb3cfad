"""The children of a checkpoint with memory, started before the agent is imported, which takes as long as they do."""

from __future__ import annotations

from blkckpt.agent import guard, receiver


class Children:
    """A memory receiver that waits for its job, and a guard of the guest at QMP socket *qmp*, not yet in charge."""

    def __init__(self, qmp: str) -> None:
        self.receiver = receiver.Receiver()
        try:
            self.guard = guard.Guard(guard.QMP, qmp, self.receiver.stream)
        except BaseException:
            self.receiver.discard()
            raise

    def discard(self) -> None:
        """End those that got nothing to do; nothing for those that did."""
        self.receiver.discard()
        self.guard.abandon()

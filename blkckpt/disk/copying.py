"""The copy of one checkpoint's disks (830): when its turn is, and what each disk is relative to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blkckpt.disk import copier, job, member, rounds


@dataclass(frozen=True, slots=True)
class Work:
    """Copies the disks of *one* into *store*.

    *parents* are images to compare with where the changes since none are known.  *check* raises if the copies cannot be
    trusted after all (D9).
    """

    one: rounds.Round
    members: Mapping[str, member.Member]
    under_way: rounds.UnderWay
    options: Mapping[str, copier.CopyOptions]
    store: str
    parents: Mapping[str, str | None]
    check: Callable[[], None]

    def run(self, running: job.Job) -> Mapping[str, Any]:
        """Wait for the copies of earlier checkpoints, then copy; ``{"disks": what each child said}``.

        One that is retained has no copy, and is waited for until it is over: its map of changes is then part of ours.
        """
        one = self.one
        one.await_turn(self.under_way.before(one), running.cancelled)
        sizes = {name: item.state.size for name, item in self.members.items()}
        results = copier.run_all(sizes, self._freeze, self.options, running)
        self.check()
        one.store, one.images = self.store, {name: str(result["image"]) for name, result in results.items()}
        one.settled.set()
        return {"disks": results}

    def _freeze(self, name: str) -> copier.FrozenDisk:
        """A disk with the best parent: the image of the checkpoint before, which may not be over yet."""
        item, part, earlier = self.members[name], self.one.parts[name], self.under_way.before(self.one)
        if earlier and earlier[-1].images is not None and earlier[-1].store == self.store:
            return item.freeze(part, earlier[-1].images[name], earlier[-1].number)
        since, fallback = item.since(part), self.parents.get(name)
        number, home = self.under_way.origin(since)
        if since is not None and (since == fallback or (self.one.stacked and home == self.store)):
            return item.freeze(part, since, number)
        return item.freeze(part, fallback, None)

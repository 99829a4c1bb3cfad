"""The end of a checkpoint that leaves no image: one that is given up, and one whose disks are retained.

Its map of changes goes to the one that follows, and its overlays lose their claim to stay (those of a retained one
have another, :mod:`blkckpt.disk.retaining`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from blkckpt import errors
from blkckpt.disk import background, rounds, states


class Leaver:
    """Ends checkpoints."""

    def __init__(
        self,
        states: states.States,
        under_way: rounds.UnderWay,
        warn: Callable[[str | None], None],
        stop: threading.Event,
    ) -> None:
        self._states = states
        self._under_way = under_way
        self._warn = warn
        self._stop = stop

    def give_up(self, chosen: Sequence[rounds.Round], leaving: Sequence[rounds.Round]) -> None:
        """End *chosen*, which take no requests any more; returns when all of *leaving* are over, whoever ends them."""
        for one in reversed(chosen):
            if one.copying is not None and one.copying.running:
                one.copying.cancel()
                one.copying.wait()
            self._hand_on_patiently(one)
            self._under_way.remove(one)
        for one in leaving:
            while not one.left.wait(0.1):
                if self._stop.is_set():
                    raise errors.StateError("stopped; it goes on when the disks are served again")

    def _hand_on_patiently(self, one: rounds.Round) -> None:
        def hand_on() -> None:
            with self._states.lock:
                parts = one.parts
                self._states.replace(
                    {name: item.hand_on_changes(parts[name]) for name, item in self._states.members.items()}
                )
                self.let_go(one)

        background.patiently(hand_on, f"ending checkpoint {one.checkpoint}", self._warn, self._stop)

    def let_go(self, one: rounds.Round) -> None:
        """The saved state does not know the changes of *one* any more."""
        with self._states.lock:
            for name, item in self._states.members.items():
                item.let_go(one.parts[name])

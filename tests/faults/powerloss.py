"""From a recorded log to many power cuts: which points, how often, and what is done with each state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.faults import crash, recorder

_TELLING = {
    recorder.RENAME, recorder.LINK, recorder.UNLINK, recorder.SYNC, recorder.CREATE, recorder.TRUNCATE,
}  # fmt: skip


def points(events: Sequence[recorder.Event], count: int, rng: random.Random) -> list[int]:
    """*count* cuts: a quarter anywhere, the others next to an event that changes what is durable."""
    telling = [number for number, event in enumerate(events) if event.kind in _TELLING]
    chosen = []
    for _ in range(count):
        if rng.random() < 0.25:
            chosen.append(rng.randint(0, len(events)))
        else:
            chosen.append(min(max(rng.choice(telling) + rng.randint(-1, 2), 0), len(events)))
    return sorted(chosen)


def states(start: crash.Machine, events: Sequence[recorder.Event], count: int, seed: int) -> Iterator[crash.State]:
    """*count* states that a power cut may leave, in the order of their cuts."""
    rng = random.Random(seed)
    position = 0
    for cut in points(events, count, rng):
        start.run(events[position:cut])
        position = cut
        yield start.cut(rng.getrandbits(48))


def failures(
    start: crash.Machine,
    events: Sequence[recorder.Event],
    root: Path,
    count: int,
    seed: int,
    check: Callable[[crash.State], str | None],
    *,
    enough: int = 5,
) -> list[str]:
    """What *check* finds wrong in *count* states, each written to *root* first; stops when that is *enough*."""
    found = []
    for state in states(start, events, count, seed):
        state.write(root)
        problem = check(state)
        if problem is not None:
            found.append(f"cut {state.cut} of {len(events)}, state seed {state.seed}: {problem}")
            if len(found) == enough:
                break
    return found


def assert_complete(start: crash.Machine, events: Sequence[recorder.Event], root: Path) -> None:
    """The recorder saw everything: the replayed log gives the files that are really there.

    SQLite's ``-shm`` files are shared mappings, which are rebuilt after a crash and not replayed.
    """
    start.run(events)
    real = {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
        if not path.name.endswith("-shm")
    }
    replayed = {name: content for name, content in start.files().items() if not name.endswith("-shm")}
    missed, gone = sorted(real.keys() - replayed.keys()), sorted(replayed.keys() - real.keys())
    assert not missed and not gone, f"the making of {missed} and the going of {gone} were not recorded"
    wrong = [name for name in real if real[name] != replayed[name]]
    assert not wrong, f"changes of {wrong} were not recorded"

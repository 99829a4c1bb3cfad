"""Storing an image, beside the two usual deduplicating backup programs; and what a collection needs.

The image is half random bytes and half text, in turns of 1 MiB, and it is in the page cache.  A sample ends when
``sync`` has returned.  Each round begins with empty repositories and takes every program's first image, then the
same image with 2 % changed.  Ours is the copy child of a checkpoint, process start and manifest included.

The changed 2 % lie in runs of 1 MiB, the peers' own average chunk or half of it, which is how they come off best
(4 KiB blocks strewn about make nearly every one of their chunks new; shown without a bar).  For the bars we read and
compare the whole image, as they do; a checkpoint reads only what the map of changed blocks names (shown without one).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import context, figures, peers
from blkckpt.store import layout, manifest, store

DESCRIPTION = "storing an image beside borg and restic, first and changed by 2 %; the memory of a collection"

MIB = 1 << 20
BLOCK = 4096
SHARE = 0.02
COLLECTED = 20 << 30


LINES = (
    "2026-##-## ##:##:##.###### host-### kernel: [######.######] eth#: renamed from veth#######, mtu ####",
    "2026-##-## ##:##:##.###### host-### sshd[#####]: Accepted publickey for user### from ##.##.##.## ####",
    "2026-##-## ##:##:##.###### host-### nginx: ##.##.##.## GET /item/######## HTTP/1.1 200 ##### 0.### s",
    "2026-##-## ##:##:##.###### host-### postgres[#####]: duration: ###.### ms statement ######## commit ",
)
"""A log, ``#`` being any digit: lz4 makes about half of it, and no two chunks are alike."""


def _text(rng: np.random.Generator, size: int) -> bytes:
    """*size* bytes of lines."""
    width = max(map(len, LINES)) + 1
    patterns = np.array([list(line.ljust(width - 1).encode() + b"\n") for line in LINES], np.uint8)
    rows = patterns[rng.integers(0, len(LINES), -(-size // width))]
    digits = rng.integers(ord("0"), ord("9") + 1, rows.shape, dtype=np.uint8)
    return np.where(rows == ord("#"), digits, rows).tobytes()[:size]


def make_image(path: Path, size: int) -> None:
    """Half random, half text, in turns of 1 MiB; written out, and in the page cache."""
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        for _ in range(size // (2 * MIB)):
            file.write(os.urandom(MIB))
            file.write(_text(rng, MIB))
    context.settle()


@contextlib.contextmanager
def changed(path: Path, run: int) -> Iterator[bytes]:
    """*path* with 2 % of it changed in runs of *run* bytes, as a map of its blocks of 4 KiB; as before afterwards."""
    size = path.stat().st_size
    rng = random.Random(run)
    places = [place * run for place in rng.sample(range(size // run), max(int(size * SHARE) // run, 1))]
    bits = np.zeros(size // BLOCK, np.bool_)
    before = {}
    with path.open("r+b") as file:
        for place in places:
            before[place] = os.pread(file.fileno(), run, place)
            os.pwrite(file.fileno(), rng.randbytes(run), place)
            bits[place // BLOCK : (place + run) // BLOCK] = True
        context.settle()
        try:
            yield np.packbits(bits, bitorder="little").tobytes()
        finally:
            for place, data in before.items():
                os.pwrite(file.fileno(), data, place)
            context.settle()


class Round:
    """What the samples of all programs came to: seconds for the first and the changed image, MiB for both."""

    def __init__(self, context_: context.Context, image: Path, run: int) -> None:
        self._context, self._image, self._run = context_, image, run
        self.first: dict[str, list[float]] = {}
        self.changed: dict[str, list[float]] = {}
        self.size: dict[str, list[float]] = {}

    def sample(self, name: str) -> None:
        """One program's turn: an empty repository, the image, the image changed."""
        root = self._context.directory / "repository"
        try:
            peer = peers.make(name, root)
            context.warm(self._image)
            first = peer.put(self._image)
            with changed(self._image, self._run) as marked:
                context.warm(self._image)
                second = peer.put(self._image, marked)
            size = peer.size() / MIB
        finally:
            context.remove_tree(root)
        for table, value in ((self.first, first), (self.changed, second), (self.size, size)):
            table.setdefault(name, []).append(value)
        self._context.say(f"  {name}: first {first:.2f} s, changed {second:.2f} s, {size:,.0f} MiB")


def _samples(table: dict[str, list[float]], unit: str) -> dict[str, figures.Samples]:
    return {name: figures.Samples(values, unit) for name, values in table.items()}


def _rounds(context_: context.Context, image: Path, run: int, names: tuple[str, ...], rounds: int) -> Round:
    """Everybody in turns, each round beginning with another."""
    taken = Round(context_, image, run)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken.sample(name)
    return taken


def _put_figures(context_: context.Context) -> list[figures.Figure]:
    image = context_.directory / "disk.raw"
    size = context_.pick(1 << 30, 4 << 30)
    context_.say(f"making an image of {size >> 30} GiB, half random, half text")
    make_image(image, size)
    names = (peers.OURS, peers.BORG, peers.RESTIC, peers.BY_MAP)
    runs = _rounds(context_, image, MIB, names, context_.pick(3, 5))
    context_.say("the changed blocks strewn about, one of 4 KiB at a time")
    strewn = _rounds(context_, image, BLOCK, (peers.OURS, peers.BORG, peers.RESTIC), 1)
    image.unlink()
    first, second = _samples(runs.first, "s"), _samples(runs.changed, "s")
    first.pop(peers.BY_MAP)
    by_map = {name: second[name] for name in (peers.BY_MAP, peers.BORG, peers.RESTIC)}
    second.pop(peers.BY_MAP)
    sizes = _samples(runs.size, "MiB")
    sizes.pop(peers.BY_MAP)
    result = []
    for peer in (peers.BORG, peers.RESTIC):
        result.append(figures.ratio(f"put_vs_{peer}", peer, peers.OURS, first, figures.at_least(1)))
        result.append(figures.ratio(f"put2_vs_{peer}", peer, peers.OURS, second, figures.at_least(2)))
        result.append(figures.ratio(f"put2_by_map_vs_{peer}", peer, peers.BY_MAP, by_map, None))
        scattered = _samples(strewn.changed, "s")
        result.append(figures.ratio(f"put2_strewn_vs_{peer}", peer, peers.OURS, scattered, None))
    result.append(figures.ratio("size_vs_borg", peers.OURS, peers.BORG, sizes, figures.at_most(1.1)))
    return result


# --- collection


def fill(home: Path) -> None:
    """A store of 20 GiB whose every pack is half dead: no two chunks alike, each of 64 bytes again and again.

    (It takes the room of its tables and 300 bytes a chunk; a collection's memory goes by chunks, not by bytes.)
    """
    with store.Store.init(home / "store") as place:
        names = iter(range(COLLECTED // layout.CHUNK))
        with place.image_writer(COLLECTED) as out:
            for offset in range(0, COLLECTED, 64 * layout.CHUNK):
                out.write(offset, b"".join(next(names).to_bytes(64, "little") * 1024 for _ in range(64)))
            whole = out.finish()
        _publish(place, "whole", whole.image)
        with place.image_writer(COLLECTED, parent=whole.image) as out:
            for number in range(0, COLLECTED // layout.CHUNK, 2):
                out.zero(number * layout.CHUNK, layout.CHUNK)
            half = out.finish()
        _publish(place, "half", half.image)
        place.remove("web", "whole")


def _publish(place: store.Store, name: str, image: str) -> None:
    disk = manifest.DiskImage("vda", image, COLLECTED)
    place.put_manifest(manifest.Manifest("web", name, "0" * 32, time.time_ns(), (disk,)))


def _gc_figures(context_: context.Context) -> list[figures.Figure]:
    home = context_.directory / "home"
    home.mkdir(mode=0o700)
    context_.say(f"filling a store of {COLLECTED >> 30} GiB (logical), half of it dead")
    fill(home)
    command = [sys.executable, "-m", "blkckpt.cli.main", "--home", str(home), "gc", "--repack", "--json"]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    report = json.loads(child.stdout.read())
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    if child.returncode or not report["repacked_packs"] or report["dead_bytes"] > report["live_bytes"]:
        raise context.BenchError(f"the collection did not do its work: {report}")
    peak, took = usage.ru_maxrss / 1024, time.monotonic() - began
    context_.say(f"  repacked {report['repacked_packs']} packs in {took:.1f} s, {peak:.0f} MiB at most")
    context.remove_tree(home)
    peak_samples = {"blkckpt gc --repack": figures.Samples([peak], "MiB"), "time": figures.Samples([took], "s")}
    return [figures.Figure("gc_peak_mb", "MiB", peak, peak_samples, figures.at_most(300))]


def run(context_: context.Context) -> list[figures.Figure]:
    peers.install()
    return _put_figures(context_) + _gc_figures(context_)

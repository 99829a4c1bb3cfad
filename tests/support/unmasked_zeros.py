"""Hook (see ``nbdkit_hooked``): a defect on purpose.  Zeros do not mask what is below an overlay (D11 broken)."""

from __future__ import annotations

from blkckpt.disk import chain

_zero = chain.zero


def _broken(view: chain.View, offset: int, length: int, *, punch: bool, fast: bool) -> None:
    if not view.layers:
        _zero(view, offset, length, punch=punch, fast=fast)


def install() -> None:
    chain.zero = _broken

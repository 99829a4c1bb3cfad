"""Hook (see ``nbdkit_hooked``): a lease of ``BLKCKPT_TEST_LEASE`` seconds instead of a minute."""

from __future__ import annotations

import os

from blkckpt.control import service


def install() -> None:
    service.LEASE_SECONDS = float(os.environ["BLKCKPT_TEST_LEASE"])

"""Hook (see ``nbdkit_hooked``): a lease of ``BLKCKPT_TEST_LEASE`` seconds, not a minute; a referee if there is one."""

from __future__ import annotations

import os

from blkckpt.control import service
from tests.support import referee


def install() -> None:
    if referee.VARIABLE in os.environ:
        referee.install()
    service.LEASE_SECONDS = float(os.environ["BLKCKPT_TEST_LEASE"])

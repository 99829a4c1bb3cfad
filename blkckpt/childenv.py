"""The environment of children that compute with numpy.

Nothing here uses its linear algebra, which starts a thread for each processor when it is loaded.  They spin before they
rest: 0.1 s of processor time for each such child, while a guest and its QEMU want the processors.
"""

from __future__ import annotations

import os


def computing() -> dict[str, str]:
    """Ours, with one thread for linear algebra unless the user wants it otherwise."""
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ}

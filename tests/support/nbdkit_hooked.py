"""The product's plugin with a test's hook in it, for faults and delays that the product has no switch for.

``BLKCKPT_TEST_HOOK`` names a module with ``install()``, called once blkckpt can be imported.  Everything else is the
plugin's own source, run in this module, since nbdkit looks its callbacks up in the script it was given.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[2] / "plugins/nbdkit_blkckpt.py"
exec(compile(_SOURCE.read_text(), str(_SOURCE), "exec"), globals())

_own_config_complete: Callable[[], None] = globals()["config_complete"]


def config_complete() -> None:
    _own_config_complete()
    importlib.import_module(os.environ["BLKCKPT_TEST_HOOK"]).install()

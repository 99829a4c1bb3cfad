"""Modules that are loaded with their first use.

numpy takes longer to load (0.1 s of processor time) than a lazy restore needs for everything else that it does in
Python, and what a guest waits for needs none of it.  A module that computes with numpy only in bulk says::

    if TYPE_CHECKING:
        import numpy as np
    else:
        np = lazy.Module("numpy")

so that the type checker sees the module, and the first attribute asked for loads it.  What must stay light, and of
what, is in ``tests/test_light.py``.
"""

from __future__ import annotations

import importlib
from typing import Any


class Module:
    """Stands for the module *name*.  Any thread may be the first to use it: the import lock orders them."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def __getattr__(self, attribute: str) -> Any:
        """Only asked for what is not known yet: each attribute is looked up once."""
        value = getattr(importlib.import_module(self._name), attribute)
        self.__dict__[attribute] = value
        return value

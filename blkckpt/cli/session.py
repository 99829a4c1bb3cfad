"""What every verb starts from: the home, its VMs, its store."""

from __future__ import annotations

from dataclasses import dataclass

from blkckpt import paths
from blkckpt.cli import progress
from blkckpt.vm import definition


@dataclass(frozen=True, slots=True)
class Session:
    """The options given before the verb."""

    home: paths.Home
    quiet: bool = False

    def vm(self, name: str) -> tuple[paths.VmPaths, definition.VmDefinition]:
        """The VM called *name*, which must be defined."""
        vm = self.home.vm(name)
        return vm, definition.load(vm)

    def reporter(self) -> progress.Reporter:
        return progress.reporter(quiet=self.quiet)

"""The import ranks: a module imports only modules of lower rank; no cycles, also none inside functions.

``disk`` never imports ``store``, ``vm`` or ``agent``; only ``plugins`` imports ``nbdkit``; only ``view.fuse``
imports the FUSE binding; only ``cli`` prints.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "blkckpt"

RANKS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "lazy", "childenv"}),
    frozenset({"units", "log", "durable", "scheduling", "exchange.qemuimg"}),
    frozenset({
        "paths", "disk.barrier", "disk.api", "disk.blocks", "memory.records", "vm.qemuopts",
        "agent.drain", "agent.fastfilter",
    }),
    # Pure: values and bytes, no process, no socket.
    frozenset({
        "disk.blockmap", "disk.format", "disk.fastpath", "control.messages", "control.wire", "store.layout",
        "store.manifest", "store.retention", "agent.plan", "agent.qemuargs", "memory.stream", "memory.skeleton",
        "vm.definition", "vm.unfinished", "vm.writeprotect", "vm.commandline",
        "vm.barrier", "vm.lineage", "vm.network", "vm.screen",
        "memory.nics",
    }),
    frozenset({"view.source", "view.parsing", "view.jbd2", "vm.alone"}),
    frozenset({"view.partitions", "view.probe", "view.guestfs"}),
    frozenset({"view.parser", "view.volumes"}),
    frozenset({"view.walk"}),
    frozenset({"view.extract", "view.heatmap"}),
    frozenset({
        "store.backend", "store.codec", "store.index", "store.leaves", "store.lock", "store.reference",
        "store.lowly", "agent.forked",
    }),
    frozenset({
        "disk.fileio", "disk.claim", "disk.epoch", "disk.job", "control.server", "control.client", "control.quitter",
        "vm.qmp", "vm.guestagent", "vm.dialogue",
        "store.packs", "store.pins", "store.labels", "store.evidence", "store.readahead",
        "memory.image", "memory.generate", "agent.child",
    }),
    frozenset({
        "disk.maps", "memory.assemble", "agent.rundir", "agent.guard", "agent.turn", "agent.consistency",
        "agent.machine", "agent.options", "agent.receiver",
    }),
    frozenset({
        "disk.layer", "agent.rescue", "memory.intake", "store.images", "agent.nbdserver", "view.records",
        "view.touched",
    }),
    frozenset({"view.starting", "agent.template"}),
    frozenset({
        "store.compare", "store.contents", "store.frozen", "store.marks", "store.writer", "memory.apart",
        "exchange.bundle", "exchange.pump", "agent.early",
    }),
    frozenset({"disk.chain", "store.repack"}),
    frozenset({"store.collect", "disk.stack"}),
    frozenset({"store.retained"}),
    frozenset({"store.store"}),
    frozenset({
        "agent.history", "disk.copier", "disk.commit", "disk.fill", "disk.port", "store.check",
        "store.ingest", "store.keeping",
        "memory.feed", "store.usage", "view.changes", "view.filediff", "view.report", "view.chunks", "view.physical",
        "view.devices",
    }),
    frozenset({
        "disk.disk", "disk.statefile", "memory.receive", "agent.forget", "agent.checkpoint", "exchange.inuse",
        "exchange.beside", "view.content", "view.elf", "view.held",
    }),
    frozenset({"view.layers"}),
    frozenset({
        "disk.member", "exchange.exports", "exchange.packing", "exchange.unpacking", "view.library", "view.nodes",
    }),
    frozenset({"disk.states"}),
    frozenset({"disk.background", "exchange.server", "disk.rounds", "view.guest", "view.mounts"}),
    frozenset({"disk.copying", "disk.leaving", "disk.retaining"}),
    frozenset({"disk.group", "agent.runner", "view.tree", "exchange.outward"}),
    frozenset({"control.service", "agent.supervisor", "view.fuse", "exchange.core"}),
    frozenset({"view.daemon"}),
    frozenset({"daemon.quiet", "daemon.notify", "daemon.record", "daemon.schedule", "daemon.jobs", "daemon.packaged"}),
    frozenset({"daemon.planner", "daemon.readings", "daemon.metrics", "daemon.exposition"}),
    frozenset({"daemon.task", "daemon.service", "daemon.survey"}),
    frozenset({"daemon.host"}),
    frozenset({"control.host", "restore.disks", "restore.ram", "restore.fused", "restore.prefetch"}),
    frozenset({"control.template", "restore.machine", "restore.atrest", "exchange.inward"}),
    frozenset({"restore.revert", "restore.flatten", "restore.fork", "restore.boot"}),
    frozenset({"doctor"}),
    frozenset({"cli"}),
)  # fmt: skip

ONLY = {"nbdkit": "plugins", "mfusepy": "view.fuse", "fuse": "view.fuse", "prometheus_client": "daemon."}


def rank(module: str) -> int:
    """The rank of *module* (without the package's name); longest prefix wins."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, names in enumerate(RANKS):
            if ".".join(parts[:length]) in names:
                return number
    raise AssertionError(f"blkckpt.{module} has no rank: add it to RANKS")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def imports(path: Path) -> Iterator[str]:
    """Every module that *path* imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def exists(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


@pytest.mark.parametrize(("name", "path"), [pytest.param(*pair, id=pair[0]) for pair in modules()])
def test_imports_go_down(name: str, path: Path) -> None:
    own = rank(name)
    for imported in imports(path):
        top = imported.split(".")[0]
        if top in ONLY:
            assert name.startswith(ONLY[top]), f"only {ONLY[top]} may import {top}"
        if not imported.startswith("blkckpt."):
            continue
        assert exists(imported), f"{name} imports a name, not a module: {imported}"
        target = imported.removeprefix("blkckpt.")
        if name.startswith("cli.") and target.startswith("cli."):
            continue
        assert rank(target) < own, f"{name} (rank {own}) imports {target} (rank {rank(target)})"


def test_only_the_command_line_prints() -> None:
    for name, path in modules():
        if name.startswith("cli."):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno} prints"


def test_packages_export_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            assert not isinstance(node, ast.Import | ast.ImportFrom) or (
                isinstance(node, ast.ImportFrom) and node.module == "__future__"
            ), f"{path} re-exports"

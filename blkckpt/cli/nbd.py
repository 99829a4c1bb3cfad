"""``blkckpt nbd``: a checkpoint's disks for any NBD client, read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from blkckpt import errors, units
from blkckpt.cli import names, output, session, verb
from blkckpt.exchange import server

_ONE = "vm, checkpoint, pid, disks: [{name, size, uri}]"


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt nbd web@before-upgrade",
        "blkckpt nbd web@latest --detach --json | jq -r '.disks[0].uri'",
        'nbdcopy "$(blkckpt nbd web@latest --detach)" web.raw; blkckpt stop web@latest',
        "blkckpt nbd web@latest --port 10809",
        "blkckpt nbd --list",
    ),
    keys=f"{_ONE}; with --list exports: [{{{_ONE}}}]",
)
@verb.optional_target_argument
@click.option("--detach", is_flag=True, help="Return when it is served; `blkckpt stop VM@CKPT` ends it.")
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Listen there [default: a socket in a directory of its own]; 0600 in any case.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Listen on this TCP port of 127.0.0.1 instead (0: any). Every user of this machine can read it then.",
)
@click.option("--list", "list_", is_flag=True, help="Show what is being exported.")
@verb.json_option
@click.pass_obj
def command(
    ours: session.Session,
    target: names.Target | None,
    detach: bool,
    socket_path: Path | None,
    port: int | None,
    list_: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint's disks over NBD, read-only, until Ctrl-C or `blkckpt stop VM@CKPT`.

    Prints one URI a disk. Holes are told as such, several connections are served at once, and every byte has had its
    hash checked. The data stays while it is exported, though the checkpoint be removed.
    """
    if list_:
        _list(ours, as_json)
        return
    if target is None or target.checkpoint is None:
        raise errors.InputError("name a checkpoint: blkckpt nbd VM@CKPT (or --list to see what is exported)")
    if socket_path is not None and port is not None:
        raise errors.InputError("--socket and --port exclude each other: a server listens in one place")
    found = ours.checkpoint(target)
    if not found.manifest.disks:
        raise errors.InputError(f"{target} holds no disk that could be exported")
    serving = server.start(
        ours.home,
        found.store,
        found.manifest,
        socket_path=None if socket_path is None else socket_path.absolute(),
        port=port,
        detach=detach,
    )
    try:
        _print(serving, as_json)
        if not detach:
            if not ours.quiet:
                click.echo(f"blkckpt: exporting {serving.vm}@{serving.checkpoint}; Ctrl-C ends it", err=True)
            _watch(serving)
    except BaseException:
        server.stop(ours.home, serving)
        raise
    if not detach:
        server.stop(ours.home, serving)


def _watch(serving: server.Serving) -> None:
    """Until Ctrl-C, `stop`, or its death; the last is an error."""
    try:
        server.wait(serving)
    except KeyboardInterrupt:
        return


def stop(ours: session.Session, target: names.Target, as_json: bool) -> None:
    """What ``blkckpt stop VM@CKPT`` does."""
    if target.checkpoint == names.LATEST:
        target = names.Target(target.vm, ours.checkpoint(target).manifest.name)
    assert target.checkpoint is not None
    serving = server.find(ours.home, target.vm, target.checkpoint)
    if serving is not None:
        server.stop(ours.home, serving)
    if as_json:
        output.write_json({"vm": target.vm, "checkpoint": target.checkpoint, "stopped": serving is not None})
    else:
        output.write(f"{target} is {'not exported any more' if serving else 'not being exported'}")


def _list(ours: session.Session, as_json: bool) -> None:
    found = server.running(ours.home)
    if as_json:
        output.write_json({"exports": [_keys(one) for one in found]})
        return
    rows = [
        (f"{one.vm}@{one.checkpoint}", disk, units.format_size(size), one.process.pid, one.uri(disk))
        for one in found
        for disk, size in one.disks.items()
    ]
    output.write(output.table(("CHECKPOINT", "DISK", "SIZE", "PROCESS", "URI"), rows, right=("SIZE", "PROCESS")))


def _print(serving: server.Serving, as_json: bool) -> None:
    if as_json:
        output.write_json(_keys(serving))
    else:
        output.write("\n".join(serving.uri(disk) for disk in serving.disks))


def _keys(serving: server.Serving) -> dict[str, Any]:
    disks = [{"name": disk, "size": size, "uri": serving.uri(disk)} for disk, size in serving.disks.items()]
    return {"vm": serving.vm, "checkpoint": serving.checkpoint, "pid": serving.process.pid, "disks": disks}

"""The entry point: finds the verb, turns errors into one line and an exit code.

Verbs are imported when they are used, so that ``blkckpt list`` does not pay for QMP, asyncio and the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import keyword
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

import click

import blkckpt
from blkckpt import errors, log, paths
from blkckpt.cli import output, session

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

VERBS = {
    "vm": "Define VMs and their disks.",
    "run": "Start a VM: its disk server and its QEMU.",
    "serve": "Serve a VM's disks without starting a hypervisor.",
    "stop": "Stop a VM that blkckpt runs or serves.",
    "checkpoint": "Take a checkpoint of a running VM.",
    "flatten": "Copy a retained checkpoint into the store, online.",
    "commit": "Give a retained checkpoint up, online.",
    "schedule": "Take checkpoints of a VM regularly.",
    "agent": "Work off the schedules: the daemon.",
    "list": "List checkpoints.",
    "show": "Show one checkpoint.",
    "diff": "Show what two checkpoints differ in.",
    "report": "Write a VM's history as one HTML page.",
    "ls": "List a guest's files in a checkpoint.",
    "cat": "Write a guest's file to standard output.",
    "cp": "Copy a guest's files out of a checkpoint.",
    "mount": "Mount checkpoints as files.",
    "umount": "Unmount them again.",
    "tag": "Give a checkpoint tags.",
    "untag": "Take tags from a checkpoint.",
    "note": "Add a note to a checkpoint.",
    "pin": "Keep a checkpoint from rm and prune.",
    "unpin": "Let a pinned checkpoint go.",
    "restore": "Start a new VM from a checkpoint.",
    "fork": "Start several new VMs from one checkpoint.",
    "prefetch": "Make the memory of a lazily restored VM its own.",
    "revert": "Take a VM's own disks and state back to a checkpoint.",
    "nbd": "Export a checkpoint's disks over NBD, read-only.",
    "export": "Write a checkpoint's disk or memory to a file.",
    "import": "Make a VM or a checkpoint from image files.",
    "bundle": "Put checkpoints into one file, for another host.",
    "unbundle": "Make checkpoints of a bundle.",
    "status": "Show what runs and what is under way.",
    "du": "Show what checkpoints cost.",
    "stats": "Show sizes, deduplication and compression.",
    "top": "Watch the disks work: requests, throughput, progress.",
    "verify": "Check that checkpoints are whole.",
    "rm": "Remove a checkpoint.",
    "prune": "Remove checkpoints by rules: keep the last, daily, weekly …",
    "gc": "Free the space that nothing needs.",
    "store": "Make or find the checkpoint store.",
    "completion": "Print a completion script for the shell.",
    "man": "Show the manual page of a verb.",
    "doctor": "Say what this machine lacks, and what to do.",
}
"""Every verb and its line in the overview: the module :mod:`blkckpt.cli` has under that name, its ``command``."""


class Verbs(click.Group):
    """Loads a verb's module when it is asked for; the one place where errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command = importlib.import_module(f"blkckpt.cli.{module}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            complain("interrupted")
            ctx.exit(INTERRUPTED)
        except Terminated:
            complain("terminated")
            ctx.exit(TERMINATED)
        except Exception as error:
            ctx.exit(report(error, debug=ctx.params["debug"]))


class Terminated(BaseException):
    """SIGTERM, as an exception, so that everything opened is closed on the way out."""


def report(error: Exception, *, debug: bool) -> int:
    """Say what went wrong in one line; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, errors.BlkckptError):
        complain(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        known = errors.from_os_error(error, error.filename or "system call failed")
        complain(str(known))
        return known.exit_code
    hint = "" if debug else "; rerun with --debug for the traceback"
    complain(f"internal error: {type(error).__name__}: {error}{hint}")
    return errors.BlkckptError.exit_code


def complain(text: str) -> None:
    """One line on standard error, whatever *text* holds."""
    click.echo(f"blkckpt: {output.printable(' '.join(text.split()))}", err=True)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--home", metavar="DIR", help="Where state is kept [default: $BLKCKPT_HOME, else per user].")
@click.option("-v", "--verbose", count=True, help="Say what is being done; twice for more.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(blkckpt.__version__, prog_name="blkckpt")
@click.pass_context
def command(ctx: click.Context, home: str | None, verbose: int, quiet: bool, debug: bool) -> None:
    """Checkpoints of running virtual machines, taken and used beneath stock QEMU.

    \b
    blkckpt vm create web --disk /srv/web.raw
    blkckpt run web --detach -- qemu-system-x86_64 -m 2G -nographic
    blkckpt checkpoint web --name before-upgrade
    blkckpt restore web@before-upgrade --as web-copy

    `blkckpt VERB --help` has examples for each verb; `blkckpt doctor` says whether this machine is ready.
    """
    log.setup((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)], as_json=False)
    ctx.obj = session.Session(paths.home(home), quiet=quiet)


def main() -> None:
    """The console script ``blkckpt``."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command(prog_name="blkckpt")
    except SystemExit as end:
        if isinstance(end.code, int):
            _leave(end.code)
        raise
    except OSError as error:  # outside the verbs: the help could not be written
        _leave(report(error, debug=False))


def _leave(status: int) -> None:
    """End at once: verbs close what they open, and to take the interpreter down takes 0.05 s after a checkpoint.

    Where the output cannot be flushed this returns, and the interpreter ends as it does.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    main()

"""``blkckpt doctor``: what this machine lacks."""

from __future__ import annotations

import click

from blkckpt import doctor, errors
from blkckpt.agent import nbdserver
from blkckpt.cli import output, session, verb


@click.command(
    cls=verb.Verb,
    examples=(
        "blkckpt doctor",
        "blkckpt doctor --fix",
        "blkckpt doctor --json | jq '.findings[] | select(.status != \"ok\")'",
    ),
    keys="ok, findings: [{name, status: ok|warn|fail, found, advice}]",
)
@click.option("--fix", is_flag=True, help="First build the fast path for this machine's nbdkit, if it is not there.")
@verb.json_option
@click.pass_obj
def command(ours: session.Session, fix: bool, as_json: bool) -> None:
    """Check this machine: nbdkit and its interpreter, QEMU, userfaultfd, KVM, FUSE, directories, space.

    Exit code 10 when something is missing without which a running VM cannot be checkpointed.
    """
    if fix:
        _fix()
    findings = []
    for finding in doctor.examine(ours.home):
        findings.append(finding)
        if not as_json:
            output.write(_line(finding))
    failed = [finding for finding in findings if finding.status is doctor.Status.FAIL]
    if as_json:
        output.write_json({"ok": not failed, "findings": [_keys(finding) for finding in findings]})
    if failed:
        raise errors.MissingError(f"this machine lacks: {', '.join(finding.name for finding in failed)}")


def _fix() -> None:
    """A machine that cannot build it still works: the check says what is missing."""
    try:
        nbdserver.build_fast_path()
    except errors.BlkckptError as error:
        click.echo(f"blkckpt: {error}", err=True)


def _line(finding: doctor.Finding) -> str:
    text = f"{finding.status.value:<5} {finding.name:<21} {finding.found}"
    return text if not finding.advice else f"{text}\n{'':>27} -> {finding.advice}"


def _keys(finding: doctor.Finding) -> dict[str, str]:
    return {
        "name": finding.name,
        "status": finding.status.value,
        "found": finding.found,
        "advice": finding.advice,
    }

"""``blkckpt doctor``: what this machine lacks."""

from __future__ import annotations

import click

from blkckpt import doctor, errors
from blkckpt.cli import output, session, verb


@click.command(
    cls=verb.Verb,
    examples=("blkckpt doctor", "blkckpt doctor --json | jq '.findings[] | select(.status != \"ok\")'"),
    keys="ok, findings: [{name, status: ok|warn|fail, found, advice}]",
)
@verb.json_option
@click.pass_obj
def command(ours: session.Session, as_json: bool) -> None:
    """Check this machine: nbdkit and its interpreter, QEMU, userfaultfd, KVM, FUSE, directories, space.

    Exit code 10 when something is missing without which a running VM cannot be checkpointed.
    """
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

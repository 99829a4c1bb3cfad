"""``blkckpt completion``: a script for the shell."""

from __future__ import annotations

import click
from click import shell_completion

from blkckpt.cli import output, verb

VARIABLE = "_BLKCKPT_COMPLETE"
"""Which click looks for in the environment of a program called blkckpt."""

_BASH_WORDS = """
# '@' is a part of VM@CKPT, not the end of a word.
COMP_WORDBREAKS=${COMP_WORDBREAKS//@/}
"""


@click.command(
    cls=verb.Verb,
    examples=(
        'eval "$(blkckpt completion bash)"      # in ~/.bashrc',
        'eval "$(blkckpt completion zsh)"       # in ~/.zshrc',
        "blkckpt completion fish > ~/.config/fish/completions/blkckpt.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print a script that makes the shell complete verbs, options, VMs and checkpoints."""
    kind = shell_completion.get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root().command
    text = kind(root, {}, "blkckpt", VARIABLE).source()
    output.write(text + _BASH_WORDS if shell == "bash" else text)

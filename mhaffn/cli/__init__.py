"""The ``mhaffn`` command: a file for each of its commands, and what they share in :mod:`mhaffn.cli.common`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer
from rich.markup import escape

import mhaffn
from mhaffn.cli import bench, demo, doctor, evaluate, pack, plan, run, verify
from mhaffn.cli.common import console
from mhaffn.errors import MhaffnError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Llama-class models that do not fit the GPU: weights stream SSD → pinned memory → GPU, sublayer by "
    "sublayer, while earlier ones compute. Start with `mhaffn doctor`, then `mhaffn run MODEL -p 'Hello'`.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On errors show the traceback too.")] = False,
) -> None:
    if version:
        print(f"mhaffn {mhaffn.__version__}")
        raise typer.Exit


# In the order of --help.
app.command()(run.run)
app.command(cls=pack.PackCommand)(pack.pack)
app.command()(verify.verify)
app.command("eval")(evaluate.evaluate)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(demo.demo)


def main() -> None:
    """Entry point: errors of ours print one paragraph and exit with 2; ``--debug`` shows the traceback."""
    arguments, debug = _without_debug(sys.argv[1:])
    try:
        app(args=arguments)
    except (MhaffnError, OSError) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        raise SystemExit(130) from None


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """``--debug`` may stand anywhere, but a prompt may be that word too."""
    kept = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if argument != "--debug" or before in ("-p", "--prompt")
    ]
    return kept, len(kept) < len(arguments)

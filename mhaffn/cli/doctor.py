"""``mhaffn doctor``: what is found on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mhaffn.cli.common import console, writable
from mhaffn.errors import ConfigError


def doctor(
    path: Annotated[
        Path, typer.Argument(help="The folder that models lie in, or will: what is tried or measured is its disk.")
    ] = Path(),
    disk: Annotated[bool, typer.Option("--disk", help="Measure reads by engine, block and depth: 10 seconds.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what `mhaffn plan` needs, and keep it: SSD, link, compute.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="--measure: compute with the widths of llama3-70b, llama3-8b or a model's config.json."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="--measure: tokens of a prompt, may be repeated [2048; without a GPU 128]."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(callback=writable, help="--measure: the file to write, instead of the user's own.")
    ] = None,
) -> None:
    """Say what mhaffn finds here – engine, O_DIRECT, memory limits, GPU, versions – and how to mend what is amiss.

    Exits with 1 when something keeps mhaffn from working at all. Examples:

        mhaffn doctor ~/models --disk

        mhaffn doctor ~/models/Llama-3.1-70B-Instruct --measure
    """
    from mhaffn.doctor import disk_table, examine, measure_machine

    for name, value in {"model": model, "tokens": tokens or None, "profile": profile}.items():
        if value is not None and not measure:
            raise ConfigError(f"got --{name} without --measure, which alone has a use for it")
    table = Table(show_header=False, box=None, padding=(0, 1))
    findings = examine(path)
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.name, escape(finding.detail))
        if finding.fix:
            table.add_row("", "", f"[dim]→ {escape(finding.fix)}[/]")
    out = Console()
    out.print(table)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)
    if disk:
        out.print(disk_table(path))
    if measure:
        out.print(measure_machine(path, model, tokens, profile, console))

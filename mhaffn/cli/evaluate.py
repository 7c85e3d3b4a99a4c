"""``mhaffn eval``: what a model makes of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, TextColumn

from mhaffn.cli.common import (
    DeviceOption,
    DramOption,
    GpuOption,
    JsonOption,
    ModelArgument,
    console,
    progress_bar,
    results,
    write_json,
)


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text, in UTF-8: some thousand tokens or more.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this model too, as the one in bf16 it was made of."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window [2048, or what the model knows, if less].")
    ] = None,
    gpu: GpuOption = "auto",
    dram: DramOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure what a model makes of a text: perplexity, and how far it is from a reference (KL divergence).

    Both models are streamed; --gpu and --dram count for each of them. Ctrl-C ends with what was measured so far.

        mhaffn eval ~/models/llama-70b-int4 --text book.txt --reference ~/models/llama-70b
    """
    from mhaffn.evaluate import evaluate as measure
    from mhaffn.session import Options

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    with progress_bar(*columns) as bar:
        task = bar.add_task("loading", total=None)
        found = measure(
            model,
            text,
            reference=reference,
            context=context,
            options=Options(gpu=gpu, dram=dram, device=device),
            progress=lambda done, total: bar.update(task, description="evaluating", completed=done, total=total),
            say=lambda text: bar.console.print(escape(text), highlight=False, soft_wrap=True),
        )
    results(json_file).print(found.summary(), highlight=False, soft_wrap=True)
    write_json(found.to_dict(), json_file)
    if not found.finished:
        console.print("interrupted", style="yellow")
        raise typer.Exit(130)

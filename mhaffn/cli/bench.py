"""``mhaffn bench``: measure this machine by sublayer, or compare two measurements."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mhaffn.cli.common import DeviceOption, console
from mhaffn.errors import ConfigError


def bench(
    shape: Annotated[
        str, typer.Option(help="llama3-70b, llama3-8b, seed, tiny, or a model folder or hub id (only config.json).")
    ] = "llama3-70b",
    out: Annotated[Path, typer.Option(help="Where report.md, report.json and the figures go.")] = Path("mhaffn-report"),
    lang: Annotated[str, typer.Option(help="The document's language: en or zh.")] = "en",
    quick: Annotated[bool, typer.Option("--quick", help="In a minute or so: fewer layers, shorter prompt.")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Seconds of measuring; 90 unless given, 15 with --quick.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of the prompt; 2048, with --quick 512.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=2, help="Layers written to disk and streamed; 4, with --quick 2.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="On the disk to measure: random weights are written here and removed at the end.")
    ] = Path(),
    gpu: Annotated[
        str, typer.Option(help="GPU memory it may take, and forecasts count on, e.g. 14GiB. auto: what is free now.")
    ] = "auto",
    dram: Annotated[
        str, typer.Option(help="Host memory it may take, and forecasts count on, e.g. 32GiB. auto: what is free now.")
    ] = "auto",
    device: DeviceOption = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two report.json files instead of measuring.")
    ] = None,
    fail_on_regression: Annotated[
        float | None, typer.Option(min=0.0, help="With --compare: exit with 1 where something got worse by this %.")
    ] = None,
) -> None:
    """Measure this machine by sublayer, with random weights, and write the document of it.

    Weight sizes, compute, links, roofs, the executed pipeline beside its bound, and what to change. Examples:

        mhaffn bench --shape llama3-70b --folder /mnt/nvme --out report

        mhaffn bench --compare before/report.json after/report.json --fail-on-regression 5
    """
    if compare is not None:
        raise typer.Exit(_compare(*compare, fail_on_regression))
    if fail_on_regression is not None:
        raise ConfigError("--fail-on-regression goes with --compare A.json B.json, and got none")
    from mhaffn.bench import files, session
    from mhaffn.bench.words import LANGUAGES
    from mhaffn.shapes import shape_of

    language = next((known for known in LANGUAGES if known == lang), None)
    if language is None:
        raise ConfigError(f"got --lang {lang}, expected one of {', '.join(LANGUAGES)}")
    shape_of(shape)  # what is wrong with it, before a folder is made
    settings = session.Settings(
        shape=shape, quick=quick, seconds=seconds, tokens=tokens, layers=layers, gpu=gpu, dram=dram, device=device,
        folder=folder,
    )  # fmt: skip
    try:
        with files.prepared(out):
            written = files.write(session.run(settings, console), out, language)
    except KeyboardInterrupt:
        console.print("interrupted; what was written to be measured is removed", style="yellow")
        raise typer.Exit(130) from None
    for path in written:
        print(path)


def _compare(first_file: Path, second_file: Path, fail_on_regression: float | None) -> int:
    """Shows what differs between two reports; gives the exit code."""
    from mhaffn.bench.compare import compare, regressions, remarks, render
    from mhaffn.bench.read import Report

    first, second = Report.read(first_file), Report.read(second_file)
    found = compare(first, second)
    Console(width=None if sys.stdout.isatty() else 120).print(render(first, second, found))
    for line in remarks(first, second, found):
        console.print(escape(line), highlight=False)
    worse = regressions(found, fail_on_regression) if fail_on_regression is not None else []
    for item in worse:
        console.print(f"[red]regression:[/] {escape(item.name)} {item.change:+.1%}", highlight=False)
    return 1 if worse else 0

"""``mhaffn verify``: compare every checksum of a packed store."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

from mhaffn.cli.common import (
    DirectOption,
    EngineOption,
    JsonOption,
    ModelArgument,
    progress_bar,
    results,
    write_json,
)


def verify(
    model: ModelArgument,
    engine: EngineOption = "auto",
    direct: DirectOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Read a whole packed store and compare every checksum: names each damaged sublayer and missing file.

    Exits with 0 when all is well, 1 when something is damaged, 2 when there is no store to look at.

    Of a folder without checksums, as from Hugging Face, only headers, names, shapes and file sizes are checked.

        mhaffn verify ~/models/llama-70b --json - | jq '.damages[].file'
    """
    from mhaffn.verify import verify as read_store

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with progress_bar(*columns) as bar:
        task = bar.add_task("verifying", total=None)
        found = read_store(
            model,
            engine=engine,  # type: ignore[arg-type]  # checked there
            direct=direct,  # type: ignore[arg-type]
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    out = results(json_file)
    for damage in found.damages:
        out.print(f"[red]damaged[/] {escape(damage.message)}", soft_wrap=True, highlight=False)
    out.print(escape(found.summary()), soft_wrap=True, highlight=False)
    write_json(found.to_dict(), json_file)
    if not found.ok:
        raise typer.Exit(1)

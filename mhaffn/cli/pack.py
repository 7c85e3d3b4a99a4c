"""``mhaffn pack``: write a packed store."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

from mhaffn.cli.common import FormatOption, console, progress_bar
from mhaffn.config import format_bytes
from mhaffn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mhaffn.store import Store
    from mhaffn.store.source import Source

RANDOM = Path("random")
"""What ``--calibrate`` takes for no text; a file of that name is given by its whole path."""


def _text_or_random(path: Path | None) -> Path | None:
    if path is not None and path != RANDOM and (not os.path.exists(path) or path.is_dir()):  # noqa: PTH110 – never raises
        raise ConfigError(f"got --calibrate {path}, expected a text file, or random for tokens drawn at random")
    return path


class PackCommand(typer.core.TyperCommand):
    """Takes `--stripe A B C` as well as `--stripe A --stripe B --stripe C`; the parser knows only the second."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled: list[str] = []
        for argument in args:
            more = not argument.startswith("-") and len(spelled) > 1 and spelled[-2] == "--stripe"
            spelled += ["--stripe", argument] if more else [argument]
        return super().parse_args(ctx, spelled)


def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A folder with safetensors files, a hub id (org/name) in the local cache, or a .gguf file.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write; new, or an unfinished pack of the same model.")
    ],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default the source's (GGUF: bfloat16).")
    ] = None,
    mha: FormatOption = None,
    ffn: FormatOption = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYERS=FORMAT", help="Other formats for some layers: 0-1,78-79=plain or 3:ffn=int8."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|random",
            callback=_text_or_random,
            help="Weigh errors by what each matrix multiplies when the model reads this text, or tokens at random.",
        ),
    ] = None,
    mha_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put the MHA sublayers' files into this folder.")
    ] = None,
    ffn_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put the FFN sublayers' files into this folder.")
    ] = None,
    stripe: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR…", help="Spread sublayers over two folders or more, each on a disk of its own."),
    ] = None,
) -> None:
    """Write a packed store: aligned, one file a sublayer, with checksums. Without few bits transformers opens it too.

    Killed at any point, the same command goes on where it stopped.

    GGUF files must be packed. Hugging Face folders need not be: `mhaffn run` reads them in place.

    Several disks are read at once. DST then holds links to what lies in other folders, and is what to run:

        mhaffn pack SRC DST --stripe /mnt/a/llama /mnt/b/llama

        mhaffn pack SRC DST --ffn-dir /mnt/fast/llama

    Fewer bytes are a faster pass. int4:64 gives 64 columns a scale, not 128; int4:64:zeros a zero point too.

    Scales are searched. A text like yours, or tokens at random where there is none, tells what matters:

        mhaffn pack SRC DST --ffn int4 --mha int8 --calibrate random

    Weights that are in few bits already stay so unless a format is given:

        mhaffn pack SRC DST --ffn int4 --mha int8 --layers 0-1=plain
    """
    from mhaffn.formats import Formats
    from mhaffn.store import PackProgress
    from mhaffn.store import pack as write_store
    from mhaffn.store.resolve import resolve

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with progress_bar(*columns) as bar:
        task = bar.add_task(f"reading {source.name}", total=None)

        def show_calibrating(done: int, total: int) -> None:
            bar.update(task, description="calibrating", completed=done, total=total)

        def show(progress: PackProgress) -> None:
            bar.update(task, description=progress.file, completed=progress.done_bytes, total=progress.total_bytes)

        formats = Formats.parse(mha, ffn, layers or ())
        origin = source if source.suffix.lower() == ".gguf" or source.is_dir() else resolve(source)
        importance = None if calibrate is None else _importance(calibrate, show_calibrating)
        try:
            store = write_store(
                origin, target, dtype=dtype, formats=formats, importance=importance, mha_dir=mha_dir, ffn_dir=ffn_dir,
                stripe=stripe or (), progress=show,
                remark=lambda text: bar.console.print(escape(text), soft_wrap=True),
            )  # fmt: skip
        except KeyboardInterrupt:
            bar.stop()
            console.print("interrupted; the same command goes on from here", style="yellow")
            raise typer.Exit(130) from None
    console.print(escape(_summary(store, target)), soft_wrap=True, highlight=False)


def _importance(calibrate: Path, progress: Callable[[int, int], None]) -> Callable[[Source], dict[str, Tensor]]:
    from mhaffn.calibrate import importance_of, random_importance

    if calibrate == RANDOM:
        return partial(random_importance, progress=progress)
    return partial(importance_of, text=calibrate, progress=progress)


def _summary(store: Store, target: Path) -> str:
    nbytes = sum(records.nbytes for records in store.sublayers.values())
    lines = [f"packed {len(store.sublayers)} sublayers, {format_bytes(nbytes)} ({store.dtype}), into {target}"]
    for kind, found in store.formats().items():
        if set(found) != {"plain"}:
            lines.append(f"  {kind.upper()}: {', '.join(f'{format} in {n} matrices' for format, n in found.items())}")
    places = store.places()
    if len(places) > 1:
        lines += [f"  {format_bytes(nbytes)} in {folder}" for folder, nbytes in places.items()]
    if len(places) > len({folder.stat().st_dev for folder in places}):
        lines.append("  folders on one device among these: they share its speed")
    return "\n".join(lines)

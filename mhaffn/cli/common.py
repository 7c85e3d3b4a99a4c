"""What commands share: options, and where they print."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TimeRemainingColumn

from mhaffn.errors import ConfigError

console = Console(stderr=True)
"""For all that is no result."""


def writable(path: Path | None) -> Path | None:
    """Finds out before long work, not after it, that its result has nowhere to go."""
    if path == Path("-"):
        raise ConfigError("got - for a file, expected its name: standard output is taken")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is no folder")
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder; give the name of a file in it")
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: no permission, or a disk mounted read-only; name another place")
    return path


def writable_or_stdout(path: Path | None) -> Path | None:
    """The same where - stands for standard output."""
    return path if path == Path("-") else writable(path)


def writable_png(path: Path | None) -> Path | None:
    """The same, of a figure."""
    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(f"got {path} for a figure, expected a name that ends in .png")
    return writable(path)


ModelArgument = Annotated[
    str, typer.Argument(help="A Hugging Face folder, a packed store, or a hub id (org/name) in the local cache.")
]
GpuOption = Annotated[
    str, typer.Option("--gpu", help="GPU memory to use, e.g. 14GiB. auto: what is free now. 0: keep no layer there.")
]
DramOption = Annotated[
    str, typer.Option("--dram", help="Host memory to use, e.g. 32GiB. auto: what is free now. 0: keep no layer there.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda or cpu; by default CUDA where there is a GPU.")]
EngineOption = Annotated[str, typer.Option(help="How files are read: auto, io_uring or threads.")]
FormatOption = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="plain, int8, int4, fp8; int4:64 with groups of 64, int4:64:zeros.")
]
DirectOption = Annotated[str, typer.Option(help="O_DIRECT, past the page cache: auto, on or off.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", callback=writable_or_stdout, help="Write all of it to this file; - is stdout.")
]


def results(json_file: Path | None) -> Console:
    """Where what was found is shown: on standard output, unless its JSON goes there."""
    return console if json_file == Path("-") else Console()


def write_json(values: object, path: Path | None) -> None:
    """Into the file ``path``, or to standard output for ``-``."""
    content = json.dumps(values, indent=1) + "\n"
    if path == Path("-"):
        print(content, end="")
    elif path is not None:
        path.write_text(content, encoding="utf-8")


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Gone when the work ends, well or not; nothing where nobody watches."""
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)

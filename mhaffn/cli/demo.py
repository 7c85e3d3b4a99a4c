"""``mhaffn demo``: stream a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mhaffn.cli.common import DeviceOption, console, writable


def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p")] = "What is the capital of France?",
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    cache: Annotated[
        Path | None, typer.Option(help="Where the model is kept; by default mhaffn in the user's cache folder.")
    ] = None,
    device: DeviceOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=writable, help="Write the figures to this file too.")
    ] = None,
) -> None:
    """Stream a real model: SmolLM2-135M-Instruct from disk, none of its layers resident.

    Fetches the model once (93 MB), packs and streams it, and measures each link alone.

    Then it compares the tokens with those of the same model fully resident.
    """
    from mhaffn.demo import run_demo

    finished = run_demo(
        prompt, max_new_tokens=max_new_tokens, cache=cache, device=device, results=json_file, console=console
    )
    if not finished:
        raise typer.Exit(1)

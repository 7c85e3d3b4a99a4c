"""``mhaffn run``: generate text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mhaffn.cli.common import (
    DeviceOption,
    DirectOption,
    DramOption,
    EngineOption,
    GpuOption,
    ModelArgument,
    console,
    writable,
    writable_png,
)
from mhaffn.errors import ConfigError


def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; - or none: from standard input.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Draw from the likeliest tokens of this share (the model's)."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw from so many of the likeliest tokens (the model's).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    lookup: Annotated[
        int | None,
        typer.Option(
            min=1, help="Guess so many tokens a pass from the text so far: where it repeats itself, fewer passes."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, before the prompt.")] = None,
    gpu: GpuOption = "auto",
    dram: DramOption = "auto",
    context: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; by default prompt and answer of this run.")
    ] = None,
    device: DeviceOption = None,
    engine: EngineOption = "auto",
    direct: DirectOption = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Fail instead of falling back to a slower way.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check a packed store's checksums.")] = True,
    report: Annotated[bool, typer.Option("--report", help="End with a table: each link's bytes, time, speed.")] = False,
    trace: Annotated[
        Path | None, typer.Option(callback=writable, help="Write a Chrome/Perfetto trace to this file.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(callback=writable_png, help="Draw one pass, serial beside streamed, as a .png file."),
    ] = None,
) -> None:
    """Generate text; the answer goes to standard output, all else to standard error.

    Ctrl-C ends cleanly, with the summary of what was done. Examples:

        mhaffn run ~/models/Llama-3.1-70B-Instruct -p "Why is the sky blue?" --gpu 14GiB --dram 32GiB

        mhaffn run HuggingFaceTB/SmolLM2-135M-Instruct -p "Once upon a time" --raw --dram 0
    """
    from mhaffn.session import NO_TEXT, Options, Sampling, generate
    from mhaffn.timeline import check_available

    if timeline is not None:
        check_available()
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("got no prompt; give one with -p, or pipe it in")
    try:
        text = sys.stdin.read() if prompt in (None, "-") else prompt
    except UnicodeDecodeError:
        raise ConfigError(NO_TEXT) from None
    if not text or text.isspace():
        raise ConfigError("got an empty prompt; give one with -p, or pipe it in")
    options = Options(
        gpu=gpu, dram=dram, context=context, device=device, engine=engine, direct=direct, strict=strict, verify=verify
    )
    finished = generate(
        model,
        text,
        options,
        raw=raw,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, top_k, seed, lookup),
        trace=trace,
        timeline=timeline,
        table=report,
        console=console,
    )
    if not finished:
        raise typer.Exit(130)

"""The ``mhaffn`` command."""

from __future__ import annotations

import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import rich.progress
import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

import mhaffn
from mhaffn.config import format_bytes
from mhaffn.errors import ConfigError, MhaffnError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Llama-class models that do not fit the GPU: weights stream SSD → pinned memory → GPU, sublayer by "
    "sublayer, while earlier ones compute. Start with `mhaffn doctor`, then `mhaffn run MODEL -p 'Hello'`.",
)
console = Console(stderr=True)

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

RANDOM = Path("random")
"""What ``--calibrate`` takes for no text; a file of that name is given by its whole path."""


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
        console.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
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


def _writable(path: Path | None) -> Path | None:
    """Finds out before long work, not after it, that its result has nowhere to go."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is no folder")
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder; give the name of a file in it")
    if path not in (None, Path("-")) and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: no permission, or a disk mounted read-only; name another place")
    return path


def _text_or_random(path: Path | None) -> Path | None:
    if path is not None and path != RANDOM and (not os.path.exists(path) or path.is_dir()):  # noqa: PTH110 – never raises
        raise ConfigError(f"got --calibrate {path}, expected a text file, or random for tokens drawn at random")
    return path


def _write_json(values: object, path: Path | None) -> None:
    """Into the file ``path``, or to standard output for ``-``."""
    content = json.dumps(values, indent=1) + "\n"
    if path == Path("-"):
        print(content, end="")
    elif path is not None:
        path.write_text(content, encoding="utf-8")


def _bar(*columns: rich.progress.ProgressColumn) -> Progress:
    """Gone when the work ends, well or not; nothing where nobody watches."""
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On errors show the traceback too.")] = False,
) -> None:
    if version:
        print(f"mhaffn {mhaffn.__version__}")
        raise typer.Exit


@app.command()
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
        Path | None, typer.Option(callback=_writable, help="Write a Chrome/Perfetto trace to this file.")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(callback=_writable, help="Draw one pass, serial beside streamed, in this PNG file.")
    ] = None,
) -> None:
    """Generate text; the answer goes to standard output, all else to standard error.

    Ctrl-C ends cleanly, with the summary of what was done. Examples:

        mhaffn run ~/models/Llama-3.1-70B-Instruct -p "Why is the sky blue?" --gpu 14GiB --dram 32GiB

        mhaffn run HuggingFaceTB/SmolLM2-135M-Instruct -p "Once upon a time" --raw --dram 0
    """
    from mhaffn.session import Options, Sampling, generate
    from mhaffn.timeline import check_available

    if timeline is not None:
        check_available()
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("got no prompt; give one with -p, or pipe it in")
    text = sys.stdin.read() if prompt in (None, "-") else prompt
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


class _PackCommand(typer.core.TyperCommand):
    """Takes `--stripe A B C` as well as `--stripe A --stripe B --stripe C`; the parser knows only the second."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled: list[str] = []
        for argument in args:
            more = not argument.startswith("-") and len(spelled) > 1 and spelled[-2] == "--stripe"
            spelled += ["--stripe", argument] if more else [argument]
        return super().parse_args(ctx, spelled)


@app.command(cls=_PackCommand)
def pack(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A Hugging Face folder with safetensors files, or a .gguf file.")
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

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with _bar(*columns) as bar:
        task = bar.add_task(f"reading {source.name}", total=None)

        def show(progress: PackProgress) -> None:
            bar.update(task, description=progress.file, completed=progress.done_bytes, total=progress.total_bytes)

        formats = Formats.parse(mha, ffn, layers or ())
        importance = None
        if calibrate is not None:
            from mhaffn.calibrate import importance_of, random_importance

            read = random_importance if calibrate == RANDOM else partial(importance_of, text=calibrate)
            importance = partial(
                read,
                progress=lambda done, total: bar.update(task, description="calibrating", completed=done, total=total),
            )  # fmt: skip
        try:
            store = write_store(
                source, target, dtype=dtype, formats=formats, importance=importance, mha_dir=mha_dir, ffn_dir=ffn_dir,
                stripe=stripe or (), progress=show,
                remark=lambda text: bar.console.print(_escape(text), soft_wrap=True),
            )  # fmt: skip
        except KeyboardInterrupt:
            bar.stop()
            console.print("interrupted; the same command goes on from here", style="yellow")
            raise typer.Exit(130) from None
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
    console.print(_escape("\n".join(lines)), soft_wrap=True, highlight=False)


@app.command()
def verify(
    model: ModelArgument,
    engine: EngineOption = "auto",
    direct: DirectOption = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=_writable, help="Write all findings to this file; - is stdout.")
    ] = None,
) -> None:
    """Read a whole packed store and compare every checksum: names each damaged sublayer and missing file.

    Exits with 0 when all is well, 1 when something is damaged, 2 when there is no store to look at.

    Of a folder without checksums, as from Hugging Face, only headers, names, shapes and file sizes are checked.

        mhaffn verify ~/models/llama-70b --json - | jq '.damages[].file'
    """
    from mhaffn.verify import verify as read_store

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with _bar(*columns) as bar:
        task = bar.add_task("verifying", total=None)
        found = read_store(
            model,
            engine=engine,  # type: ignore[arg-type]  # checked by the reader
            direct=direct,  # type: ignore[arg-type]
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    out = console if json_file == Path("-") else Console()
    for damage in found.damages:
        out.print(f"[red]damaged[/] {_escape(damage.message)}", soft_wrap=True, highlight=False)
    out.print(_escape(found.summary()), soft_wrap=True, highlight=False)
    _write_json(found.to_dict(), json_file)
    if not found.ok:
        raise typer.Exit(1)


@app.command("eval")
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
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=_writable, help="Write the figures to this file; - is stdout.")
    ] = None,
) -> None:
    """Measure what a model makes of a text: perplexity, and how far it is from a reference (KL divergence).

    Both models are streamed; --gpu and --dram count for each of them. Ctrl-C ends with what was measured so far.

        mhaffn eval ~/models/llama-70b-int4 --text book.txt --reference ~/models/llama-70b
    """
    from mhaffn.evaluate import evaluate as measure
    from mhaffn.session import Options

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    with _bar(*columns) as bar:
        task = bar.add_task("loading", total=None)
        found = measure(
            model,
            text,
            reference=reference,
            context=context,
            options=Options(gpu=gpu, dram=dram, device=device),
            progress=lambda done, total: bar.update(task, description="evaluating", completed=done, total=total),
        )
    (console if json_file == Path("-") else Console()).print(found.summary(), highlight=False, soft_wrap=True)
    _write_json(found.to_dict(), json_file)
    if not found.finished:
        console.print("interrupted", style="yellow")
        raise typer.Exit(130)


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="llama3-70b, llama3-8b, or a model folder or hub id, of which config.json is enough; or a packed "
            "store, as it is."
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Analyse a JSON file of times measured by sublayer instead.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A machine measured with `mhaffn doctor --measure`; by default the one measured here."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="GPU memory (unmeasured: 16GiB).")] = None,
    dram: Annotated[str | None, typer.Option(help="Host memory for weights (unmeasured: 32GiB).")] = None,
    ssd: Annotated[str | None, typer.Option(help="SSD speed a second (unmeasured: 5GB).")] = None,
    h2d: Annotated[
        str | None,
        typer.Option(help="Host-to-GPU speed a second: PCIe 4 x16 25GB, PCIe 5 x16 50GB (unmeasured: 25GB)."),
    ] = None,
    hbm: Annotated[str | None, typer.Option(help="GPU memory speed a second (unmeasured: 900GB).")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.1, help="bf16 TFLOP/s the GPU reaches (unmeasured: 100).")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prefill [2048, or what the model knows, if less].")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Positions in the KV cache [4096, or what the model knows, if less].")
    ] = None,
    mha: FormatOption = None,
    ffn: FormatOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=_writable, help="Write all figures to this file; - is stdout.")
    ] = None,
) -> None:
    """Predict seconds a pass on a machine, before any weights are there, and what would help most.

    Figures given here count before measured ones (`mhaffn doctor --measure`), and those before typical ones.

    mhaffn plan llama3-70b --gpu 16GiB --dram 64GiB --ssd 4.7GB --h2d 44GB

    Fewer bits are always compared; --ffn int4:64 --mha int8 adds a mix of your own, as `mhaffn pack` takes it.
    """
    from mhaffn import planning
    from mhaffn.formats import Formats
    from mhaffn.measured import Measured, analyse, outlook
    from mhaffn.profile import Profile

    values: object
    if model is not None and measured is None:
        config, stored = planning.model_of(model)
        given = planning.Hardware.parse(gpu=gpu, dram=dram, ssd=ssd, h2d=h2d, hbm=hbm, tflops=tflops)
        known = Profile.of_this_machine() if profile is None else Profile.read(profile)
        work = planning.workload_of(config, prompt_tokens, context)
        machine, source = planning.machine_for(config, given, known, work)
        formats = Formats.parse(mha, ffn)
        formats.check(config)
        found, shown = planning.plan_for(config, machine, source, formats or None, stored)
        values = planning.to_dict(found)
    elif measured is not None and model is None:
        others = {
            "profile": profile, "gpu": gpu, "dram": dram, "ssd": ssd, "h2d": h2d, "hbm": hbm, "tflops": tflops,
            "prompt-tokens": prompt_tokens, "context": context, "mha": mha, "ffn": ffn,
        }  # fmt: skip
        for name, value in others.items():
            if value is not None:
                raise ConfigError(f"got --{name} beside --measured, whose file has all figures: change them there")
        figures = Measured.read(measured)
        layers, steps = analyse(figures), outlook(figures)
        shown = planning.analysis(figures, layers, steps)
        values = planning.analysis_to_dict(figures, layers, steps)
    else:
        raise ConfigError("give a MODEL, or --measured FILE")
    (console if json_file == Path("-") else Console()).print(shown)
    _write_json(values, json_file)


@app.command()
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
        Path | None, typer.Option(callback=_writable, help="--measure: the file to write, instead of the user's own.")
    ] = None,
) -> None:
    """Say what mhaffn finds here – engine, O_DIRECT, memory limits, GPU, versions – and how to mend what is amiss.

    Exits with 1 when something keeps mhaffn from working at all. Examples:

        mhaffn doctor ~/models --disk

        mhaffn doctor ~/models/Llama-3.1-70B-Instruct --measure
    """
    from mhaffn.doctor import disk_table, examine, measure_machine

    table = Table(show_header=False, box=None, padding=(0, 1))
    findings = examine(path)
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.name, _escape(finding.detail))
        if finding.fix:
            table.add_row("", "", f"[dim]→ {_escape(finding.fix)}[/]")
    out = Console()
    out.print(table)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)
    if disk:
        out.print(disk_table(path))
    if measure:
        out.print(measure_machine(path, model, tokens, profile, console))


@app.command()
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
    from mhaffn.bench import files, session
    from mhaffn.bench.compare import compare as compare_reports
    from mhaffn.bench.compare import regressions, remarks, render
    from mhaffn.bench.read import Report
    from mhaffn.bench.words import LANGUAGES
    from mhaffn.shapes import shape_of

    if compare is not None:
        first, second = (Report.read(path) for path in compare)
        found = compare_reports(first, second)
        Console(width=None if sys.stdout.isatty() else 120).print(render(first, second, found))
        for line in remarks(first, second, found):
            console.print(_escape(line), highlight=False)
        worse = regressions(found, fail_on_regression) if fail_on_regression is not None else []
        for item in worse:
            console.print(f"[red]regression:[/] {_escape(item.name)} {item.change:+.1%}", highlight=False)
        raise typer.Exit(1 if worse else 0)
    if fail_on_regression is not None:
        raise ConfigError("--fail-on-regression goes with --compare A.json B.json, and got none")
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


@app.command()
def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p")] = "What is the capital of France?",
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    cache: Annotated[
        Path | None, typer.Option(help="Where the model is kept; by default mhaffn in the user's cache folder.")
    ] = None,
    device: DeviceOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=_writable, help="Write the figures to this file too.")
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

"""One generation in a terminal: load, stream text as it comes, live progress, summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from mhaffn.errors import ConfigError, StoreError
from mhaffn.forecast import PHASES
from mhaffn.hf import StreamedLlama, load
from mhaffn.profile import Profile
from mhaffn.reader import ReaderInfo
from mhaffn.report import Report, engine_line, make_report, render
from mhaffn.runner import Runner
from mhaffn.simulate import Prediction, Work, predict
from mhaffn.sizes import Workload
from mhaffn.store import Store, resolve
from mhaffn.timeline import draw
from mhaffn.trace import Phase

GREEDY: dict[str, Any] = {"num_beams": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Options:
    """How a model is loaded; the fields are arguments of :func:`mhaffn.load`."""

    gpu: Any = "auto"
    dram: Any = "auto"
    context: int | None = None
    tokens: int | None = None
    device: str | None = None
    engine: Any = "auto"
    direct: Any = "auto"
    strict: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at a ``temperature`` of 0; None leaves what the model comes with.

    ``lookup`` tokens a pass are guessed from the text so far and kept where they are right: fewer passes. The likeliest
    tokens stay the same but where rounding tips a tie; drawn ones are others, of the same distribution.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    lookup: int | None = None

    def options(self) -> dict[str, Any]:
        """What transformers' ``generate`` takes. Raises :class:`ConfigError` for limits on what is not drawn."""
        limits = {"top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in limits.items() if value is not None}
        guesses = {"prompt_lookup_num_tokens": self.lookup} if self.lookup else {}
        if self.temperature > 0:
            return {"num_beams": 1, "do_sample": True, "temperature": self.temperature, **given, **guesses}
        if given:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"got {names} at a temperature of 0, which takes the likeliest token: give --temperature")
        return GREEDY | guesses


def generate(
    model: str,
    prompt: str,
    options: Options,
    *,
    raw: bool,
    system: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    trace: Path | None,
    timeline: Path | None,
    table: bool,
    console: Console,
) -> bool:
    """Streams the answer to standard output and everything else to ``console``; False if interrupted.

    ``table`` asks for bytes, time and speed of each link beside the summary.
    """
    sampling.options()  # what is wrong with them, before anything is read
    folder = resolve(model)
    config = Store.open(folder).config
    tokenizer = open_tokenizer(folder)
    ids = encode(tokenizer, prompt, raw=raw, system=system, console=console)
    if int(ids.max()) >= config.vocab_size:
        raise ConfigError(
            f"got token {int(ids.max())} from the tokenizer in {folder}, expected one of the model's "
            f"{config.vocab_size}: fetch the tokenizer that belongs to it"
        )
    guesses = sampling.lookup or 0  # come on top, in the pass of the prompt and in the last one too
    known = config.max_position_embeddings
    if options.context is not None and options.context > known:
        raise ConfigError(f"got --context {options.context}, expected at most {known}, the positions this model knows")
    limit = min(options.context or known, known - guesses)
    if ids.shape[1] >= limit:
        room = f"--context {options.context}" if options.context else f"the {known} positions that the model knows"
        among = f" and --lookup {guesses}" if guesses else ""
        raise ConfigError(f"got a prompt of {ids.shape[1]} tokens{among}, expected fewer in all than {room}")
    new_tokens = min(max_new_tokens, limit - ids.shape[1])
    context = min((options.context or ids.shape[1] + new_tokens) + guesses, known)
    loaded_options = asdict(options) | {"context": context, "tokens": ids.shape[1] + guesses}
    with loading(console) as progress, load(folder, **loaded_options, progress=progress) as loaded:
        console.print(loaded.runner.plan.describe(), highlight=False)
        written = stream_text(loaded, tokenizer, ids, new_tokens, sampling=sampling)
        new, runner = written.tokens, loaded.runner
        try:
            predicted = predictions(runner, Workload(tokens=ids.shape[1], context=context))
        except ConfigError as error:  # the run is worth more than what a broken profile would have said of it
            console.print(f"nothing predicted: {error}", style="yellow", markup=False, soft_wrap=True)
            predicted = {}
        kept: dict[Phase, int] = {"prefill": ids.shape[1], "decode": len(new) - written.first}
        reports = [
            replace(report, tokens=kept[phase])
            for phase in PHASES
            if (report := make_report(runner.trace, phase, predicted=predicted.get(phase))) is not None
        ]
        info = runner.reader_info()
        console.print(render(reports, info) if table else summary(reports, info), highlight=False, soft_wrap=not table)
        if sampling.lookup and new:
            console.print(f"{len(new)} tokens in {len(runner.trace.passes)} passes over the weights", highlight=False)
        if not written.finished:
            console.print("interrupted", style="yellow")
        elif len(new) == new_tokens and new[-1] not in _ends(loaded):
            option = "--max-new-tokens" if new_tokens == max_new_tokens else "--context"
            console.print(f"stopped at {option} {new_tokens if new_tokens == max_new_tokens else limit}", style="dim")
        if trace is not None:
            runner.trace.write_chrome(trace)
            console.print(f"trace written to {trace}", highlight=False)
        if timeline is not None and not runner.trace.passes:
            console.print("no timeline drawn: not one pass came to its end", style="yellow")
        elif timeline is not None:
            draw(runner.trace, timeline)
            console.print(f"timeline drawn in {timeline}", highlight=False)
    return written.finished


def predictions(runner: Runner, work: Workload) -> dict[Phase, Prediction]:
    """Passes as the plan's simulation has them, where `mhaffn doctor --measure` has left a profile of this device."""
    profile = Profile.of_this_machine()
    if profile is None:
        return {}
    machine = profile.machine(runner.config, None, None, work)
    if (machine.links.h2d is not None) != runner.copies:  # measured on another device
        return {}
    nbytes = {sublayer: records.nbytes for sublayer, records in runner.store.sublayers.items()}
    return {
        phase: predict(
            runner.plan, {s: Work(n, machine.compute_s[phase][s.kind]) for s, n in nbytes.items()}, machine.links
        )
        for phase in PHASES
    }


def summary(reports: Iterable[Report], info: ReaderInfo) -> str:
    """What a run was, in a line a phase."""
    lines = []
    for report in reports:
        read = sum(row.nbytes for row in report.rows if row.lane == "ssd") / report.seconds_per_pass / 2**30
        ssd = f", SSD {read:.2f} GiB/s" if read else ""
        busiest = max(report.busy, key=lambda link: report.busy[link])
        lines.append(
            f"{report.phase}: {report.tokens} tokens, {report.tokens / report.passes / report.seconds_per_pass:.2f} "
            f"tokens/s, {report.seconds_per_pass:.2f} s a pass{ssd}; busiest: {busiest} "
            f"({report.busy[busiest] / report.seconds_per_pass:.0%} of the time)"
        )
    return "\n".join([*lines, engine_line(info).strip(), "--report shows each link's bytes, time and speed"])


def _ends(model: StreamedLlama) -> list[int]:
    """The token ids that end a text."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return ends if isinstance(ends, list) else [ends] if ends is not None else []


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; raises :class:`StoreError`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"{folder} holds no tokenizer that transformers can open ({reason:.200}). "
            f"Fetch the model's tokenizer.json and tokenizer_config.json into it."
        ) from error
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool, system: str | None = None, console: Console
) -> torch.Tensor:
    """Token ids ``[1, T]``; through the chat template, after the ``system`` prompt, unless ``raw`` or there is none.

    Raises :class:`ConfigError` for an empty prompt or one that is no text, and where a system prompt has no place.
    """
    for text in (prompt, system or ""):
        check_text(text)
    if system is not None and (raw or tokenizer.chat_template is None):
        why = "--raw continues the text as it is" if raw else "this model has no chat template"
        raise ConfigError(f"got a system prompt, but {why}: put it into the prompt itself")
    if not raw and tokenizer.chat_template is None:
        console.print("this model has no chat template: the prompt is continued as it is (--raw)", style="yellow")
    if raw or tokenizer.chat_template is None:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        except Exception as error:  # a template may refuse roles, by any exception of jinja's
            raise ConfigError(f"the model's chat template refuses the prompt: {error!s:.200}") from error
        ids = encoded if isinstance(encoded, torch.Tensor) else encoded["input_ids"]
    assert isinstance(ids, torch.Tensor)  # asked for by return_tensors
    if ids.shape[1] == 0:
        raise ConfigError("got an empty prompt, expected at least one token")
    return ids


NO_TEXT = "got a prompt of bytes that are not UTF-8, expected text in UTF-8"


def check_text(text: str) -> None:
    """Raises :class:`ConfigError` where ``text`` came of bytes that are not UTF-8, which Python keeps as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(NO_TEXT) from None


@contextmanager
def loading(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for weights that stay in memory; gone once they are loaded."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("loading")

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


@dataclass(frozen=True)
class Written:
    """What was generated: token ids, how many of them the pass of the prompt gave, and whether it came to its end."""

    tokens: list[int]
    first: int
    finished: bool


def stream_text(
    model: StreamedLlama,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
) -> Written:
    """Generates to standard output, with a live line on a terminal, until the end or Ctrl-C."""
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
    ids = ids.to(model.device)
    with _TerminalText(tokenizer, model.runner) as streamer, torch.inference_mode():
        try:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                **sampling.options(),
            )
        except KeyboardInterrupt:
            streamer.end()
            finished = False
        else:
            finished = True
    passes = streamer.passes
    return Written([token for tokens in passes for token in tokens], len(passes[0]) if passes else 0, finished)


class _TerminalText(TextStreamer):
    """Prints text as it becomes final. On a terminal a last line shows tokens/s and SSD GiB/s meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, runner: Runner) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._runner = runner
        self._line = ""
        self._given: list[list[int]] = []  # the prompt's, then each pass's
        self._started_s = self._last_s = time.perf_counter()
        self._read_at_start = self._last_read = runner.reader_info().bytes_read
        self._ssd_rate = 0.0
        self._console = Console()
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> _TerminalText:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
        if self._console.is_terminal and self._line:
            self._emit(self._line)
        elif self._line:
            sys.stdout.write("\n")
        self._line = ""

    @property
    def passes(self) -> list[list[int]]:
        """The token ids that each pass gave."""
        return self._given[1:]

    def put(self, value: torch.Tensor) -> None:
        self._given.append(value.flatten().tolist())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._console.is_terminal:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._line = (self._line + text).rpartition("\n")[2]
            return
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._emit(line)
        *rows, self._line = _folded(self._line, self._console.width)
        for row in rows:
            self._emit(row)

    def _emit(self, line: str) -> None:
        """A finished row goes above the live line, folded as it was shown there."""
        for row in _folded(line, self._console.width):
            self._console.print(row, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        now = time.perf_counter()
        if now - self._last_s > 0.5:
            read = self._runner.reader_info().bytes_read
            self._ssd_rate = (read - self._last_read) / (now - self._last_s) / 2**30
            self._last_s, self._last_read = now, read
        tokens = sum(map(len, self.passes))
        rate = tokens / (now - self._started_s)
        status = f"{tokens} tokens, {rate:.2f} tokens/s, SSD {self._ssd_rate:.2f} GiB/s (Ctrl-C ends)"
        return Group(Text(self._line), Text(status, style="dim"))


def _folded(line: str, width: int) -> list[str]:
    """``line`` in rows of at most ``width`` cells, broken at spaces where there are any."""
    rows = []
    while cell_len(line) > width:
        fits = next(i for i in range(len(line), 0, -1) if cell_len(line[:i]) <= width)
        space = line.rfind(" ", 1, fits + 1)
        cut = space if space > 0 else fits
        rows.append(line[:cut])
        line = line[cut:].removeprefix(" ")
    return [*rows, line]

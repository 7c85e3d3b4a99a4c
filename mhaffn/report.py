"""What happened in a run, link by link, beside the bound that physics sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mhaffn.config import KINDS, Kind, Sublayer, format_bytes
from mhaffn.reader import ReaderInfo
from mhaffn.simulate import Prediction
from mhaffn.trace import Check, Lane, PassSpan, Phase, Span, Trace

LANE_NAMES: dict[Lane, str] = {"ssd": "SSD → host", "h2d": "host → device", "mha": "compute", "ffn": "compute"}
CHECKSUMS = "checksums"
NEITHER_LINK = "neither link"
COPIES_IN_STEP = 2
"""Copies left when a read ends, at most, where copies keep up with it: each starts when its chunk has come."""
COPIES_AT_WORK = 0.75
"""The part of a read's time, at least, that copies which cannot keep up with it are at work; others wait for it."""


@dataclass(frozen=True)
class Row:
    """Mean of one link's work on one kind of sublayer, per pass."""

    kind: Kind
    lane: Lane
    nbytes: float
    seconds: float

    @property
    def gib_per_s(self) -> float:
        return self.nbytes / self.seconds / 2**30 if self.seconds and self.nbytes else 0.0


@dataclass(frozen=True)
class Checks:
    """Checksums made per pass: bytes, and the CPU time they took, over all cores."""

    nbytes: float
    cpu_s: float

    @property
    def gb_per_s_of_core(self) -> float:
        return self.nbytes / 1e9 / self.cpu_s if self.cpu_s else 0.0


@dataclass(frozen=True)
class Report:
    """Passes of one phase: how many, how long each took, what each link did in one, and the bound.

    ``links`` maps a link to the seconds it needs for one pass: measured alone, or predicted, or, where there is
    neither, its busy time in this run. The bound is the greatest of them, because links work at
    the same time; ``share`` is bound / measured. ``busy`` maps a link to its seconds at work in this run;
    ``waits`` a link to the seconds of a pass that compute waited for it; ``predicted`` is what the plan's
    simulation said, if it was asked; ``checks`` is None where nothing was checked.
    """

    phase: Phase
    passes: int
    tokens: int
    seconds_per_pass: float
    rows: tuple[Row, ...]
    links: Mapping[str, float]
    links_measured_alone: bool
    busy: Mapping[str, float]
    waits: Mapping[str, float]
    predicted: Prediction | None
    checks: Checks | None

    @property
    def bound_link(self) -> str:
        return max(self.links, key=lambda link: self.links[link])

    @property
    def bound_s(self) -> float:
        return self.links[self.bound_link]

    @property
    def share(self) -> float:
        return self.bound_s / self.seconds_per_pass

    def to_dict(self) -> dict[str, object]:
        """All figures, for JSON: bytes, seconds and GiB/s."""
        return {
            "phase": self.phase,
            "passes": self.passes,
            "tokens": self.tokens,
            "seconds_per_pass": self.seconds_per_pass,
            "rows": [asdict(row) | {"gib_per_s": row.gib_per_s} for row in self.rows],
            "links_s": dict(self.links),
            "links_measured_alone": self.links_measured_alone,
            "bound_s": self.bound_s,
            "bound_link": self.bound_link,
            "share_of_bound": self.share,
            "busy_s": dict(self.busy),
            "waits_s": dict(self.waits),
            "predicted": None if self.predicted is None else asdict(self.predicted),
            "checks": None
            if self.checks is None
            else asdict(self.checks) | {"gb_per_s_of_core": self.checks.gb_per_s_of_core},
        }


def make_report(
    trace: Trace, phase: Phase, alone: Mapping[str, float] | None = None, predicted: Prediction | None = None
) -> Report | None:
    """The report of the passes of ``phase``; None if there were none.

    ``alone`` has the seconds a pass each link takes measured alone; ``predicted`` is shown beside.
    """
    passes, spans = trace.kept(phase)
    if not passes:
        return None
    rows = []
    for kind in KINDS:
        for lane in (kind, "h2d", "ssd"):
            of_lane = [span for span in spans if span.lane == lane and span.sublayer.kind == kind]
            if of_lane:
                seconds = sum(span.end_s - span.start_s for span in of_lane) / len(passes)
                rows.append(Row(kind, lane, sum(span.nbytes for span in of_lane) / len(passes), seconds))
    busy = _busy(passes, spans)
    return Report(
        phase=phase,
        passes=len(passes),
        tokens=sum(run.tokens for run in passes),
        seconds_per_pass=_seconds_per_pass(passes),
        rows=tuple(rows),
        links=alone or (_lane_seconds(predicted) if predicted else busy),
        links_measured_alone=alone is not None,
        busy=busy,
        waits=waits(passes, spans, trace.checks_of(passes)),
        predicted=predicted,
        checks=_checks(trace, passes),
    )


def _checks(trace: Trace, passes: Sequence[PassSpan]) -> Checks | None:
    made = trace.checks_of(passes)
    if not made:
        return None
    return Checks(sum(check.nbytes for check in made) / len(passes), sum(check.cpu_s for check in made) / len(passes))


def _seconds_per_pass(passes: Sequence[PassSpan]) -> float:
    """From the first start to the last end where passes follow each other: on a GPU a pass ends after its launches."""
    if len(passes) > 1:
        return (passes[-1].end_s - passes[0].start_s) / len(passes)
    return passes[0].end_s - passes[0].start_s


def _busy(passes: Sequence[PassSpan], spans: Sequence[Span]) -> dict[str, float]:
    """Seconds a pass each link worked within the passes; what ran before the first one did not cost them time."""
    links: dict[str, float] = {}
    for span in spans:
        seconds = span.end_s - max(span.start_s, min(passes[0].start_s, span.end_s))
        name = LANE_NAMES[span.lane]
        links[name] = links.get(name, 0.0) + seconds / len(passes)
    return links


def waits(passes: Sequence[PassSpan], spans: Sequence[Span], checks: Sequence[Check] = ()) -> dict[str, float]:
    """Seconds a pass that compute waited, by what it waited for.

    Where compute stands still, it is the next sublayer that it waits for, since all before have been there.
    Until that one's read ends, it waits for the SSD; from then until its copy ends, for the copy. Where
    copies were at work all along and are far behind when the read ends, the copy was the slower of the two.
    What then comes until its checksum is made is put down to that; what is left to nothing: launches, and the work
    between passes.
    """
    links: dict[str, float] = {}
    moves: dict[tuple[int, Sublayer], list[Span]] = {}
    for span in spans:
        moves.setdefault((span.number, span.sublayer), []).append(span)
    computes = sorted((span for span in spans if span.lane in KINDS), key=lambda span: (span.number, span.start_s))
    checked_s = {(check.number, check.sublayer): check.end_s for check in checks}
    starts_s = {run.number: run.start_s for run in passes}
    idle_s = float("-inf")
    for number, of_pass in groupby(computes, key=lambda span: span.number):
        idle_s = max(idle_s, starts_s[number])
        for compute in of_pass:
            key = number, compute.sublayer
            read_s, copied_s = _arrival(moves[key])
            causes = {
                LANE_NAMES["ssd"]: read_s, LANE_NAMES["h2d"]: copied_s, CHECKSUMS: checked_s.get(key, copied_s),
                NEITHER_LINK: compute.start_s,
            }  # fmt: skip
            for link, until_s in causes.items():
                until_s = min(until_s, compute.start_s)
                if until_s > idle_s:
                    links[link] = links.get(link, 0.0) + (until_s - idle_s) / len(passes)
                    idle_s = until_s
            idle_s = max(idle_s, compute.end_s)
    return links


def _arrival(moves: Sequence[Span]) -> tuple[float, float]:
    """Until when a sublayer waited for its read, and until when for its copy."""
    reads = [span for span in moves if span.lane == "ssd"]
    copies = sorted((span for span in moves if span.lane == "h2d"), key=lambda span: span.start_s)
    read_s = max((span.end_s for span in reads), default=float("-inf"))
    if reads and sum(copy.start_s >= read_s for copy in copies) > COPIES_IN_STEP:
        meanwhile = [copy for copy in copies if copy.start_s < read_s]
        busy_s = sum(min(copy.end_s, read_s) - copy.start_s for copy in meanwhile)
        if busy_s > COPIES_AT_WORK * (read_s - copies[0].start_s):
            read_s = copies[0].start_s
    return read_s, max((span.end_s for span in copies), default=float("-inf"))


def render(reports: Sequence[Report | None], info: ReaderInfo | None) -> RenderableType:
    """A table for people: one block a phase, then the engine, the bound and the share of it reached."""
    parts: list[RenderableType] = []
    for report in reports:
        if report is not None:
            parts += [_table(report), _lanes_table(report), Text(_pass_lines(report))]
    if info is not None:
        parts.append(Text(engine_line(info)))
    return Group(*parts)


def _table(report: Report) -> Table:
    tokens = f"{report.tokens} tokens in {report.passes} pass{'es' if report.passes > 1 else ''}"
    table = Table(title=f"{report.phase}: {tokens}, means per pass", title_justify="left", title_style="bold")
    table.add_column("sublayers")
    table.add_column("link")
    for column in ("bytes", "ms", "GiB/s"):
        table.add_column(column, justify="right")
    for row in report.rows:
        moved = row.lane in ("ssd", "h2d")
        table.add_row(
            row.kind.upper(),
            LANE_NAMES[row.lane],
            format_bytes(row.nbytes) if moved else "",
            f"{row.seconds * 1e3:.2f}",
            f"{row.gib_per_s:.2f}" if moved else "",
        )
    return table


def _lanes_table(report: Report) -> Table:
    """Each lane, and the pass as a whole: predicted, measured, the bound, and the part of a pass that the bound is.

    A lane's bound is what it needs alone; where that is not known, what it took.
    """
    predicted, bounds = report.predicted, report.links
    simulated = {} if predicted is None else _lane_seconds(predicted)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("  ms a pass", no_wrap=True)
    for column in ("predicted", "measured", "bound", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    rows: list[tuple[str, float | None, float | None, float | None]] = [
        (lane, simulated.get(lane), report.busy.get(lane), bounds.get(lane))
        for lane in dict.fromkeys((*LANE_NAMES.values(), *bounds))
        if lane in report.busy or lane in bounds
    ]
    rows.append(("pass", predicted.seconds if predicted else None, report.seconds_per_pass, report.bound_s))
    for name, *seconds in rows:
        cells = ["" if value is None else f"{value * 1e3:.1f}" for value in seconds]
        share = "" if seconds[-1] is None else f"{seconds[-1] / report.seconds_per_pass:.0%}"
        table.add_row(f"  {name}", *cells, share)
    return table


def _lane_seconds(predicted: Prediction) -> dict[str, float]:
    seconds: dict[Lane, float] = {"ssd": predicted.ssd_s, "h2d": predicted.h2d_s, "mha": predicted.compute_s}
    return {LANE_NAMES[lane]: value for lane, value in seconds.items() if value}


def _pass_lines(report: Report) -> str:
    rate = report.tokens / report.passes / report.seconds_per_pass
    lines = [f"  pass      {report.seconds_per_pass * 1e3:.1f} ms ({rate:.2f} tokens/s)"]
    if report.links_measured_alone or report.predicted:
        by = f"{report.bound_link}, {'measured alone' if report.links_measured_alone else 'predicted'}"
        lines.append(f"  bound     {report.bound_s * 1e3:.1f} ms, by {by}: {report.share:.0%} of it reached")
    else:
        lines.append(f"  busiest   {report.bound_link}, at work {report.share:.0%} of the time")
    waited_s = sum(report.waits.values())
    causes = ", ".join(f"{link} {seconds * 1e3:.1f} ms" for link, seconds in _largest_first(report.waits))
    part = f"{waited_s * 1e3:.1f} ms a pass, {waited_s / report.seconds_per_pass:.0%} of it"
    lines.append(f"  waited    compute stood still {part}{', for ' + causes if causes else ''}")
    if report.checks is not None:
        cost = f"{report.checks.cpu_s * 1e3:.1f} ms of CPU a pass, {report.checks.gb_per_s_of_core:.1f} GB/s a core"
        lines.append(f"  checksums {cost}")
    return "\n".join(lines) + "\n"


def _largest_first(links: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(links.items(), key=lambda item: -item[1])


def engine_line(info: ReaderInfo) -> str:
    """The engine and mode that really read, and each fallback with its reason."""
    mode = "O_DIRECT" if info.direct == "on" else "buffered"
    line = f"  engine    {info.engine}, {mode}"
    return "\n".join([line, *(f"  fallback  {reason}" for reason in info.reasons)])

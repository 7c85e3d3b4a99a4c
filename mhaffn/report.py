"""What happened in a run, link by link, beside the bound that physics sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mhaffn.config import KINDS, Kind, format_bytes
from mhaffn.reader import ReaderInfo
from mhaffn.trace import Lane, PassSpan, Phase, Span, Trace

LANE_NAMES: dict[Lane, str] = {"mha": "compute", "ffn": "compute", "h2d": "host → device", "ssd": "SSD → host"}


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
class Report:
    """Passes of one phase: how many, how long each took, what each link did in one, and the bound.

    ``links`` maps a link to the seconds it needs for one pass: measured alone, or, where nothing was
    measured alone, its busy time in this run. The bound is the greatest of them, because links work at
    the same time; ``share`` is bound / measured.
    """

    phase: Phase
    passes: int
    tokens: int
    seconds_per_pass: float
    rows: tuple[Row, ...]
    links: Mapping[str, float]
    links_measured_alone: bool

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
        }


def make_report(trace: Trace, phase: Phase, alone: Mapping[str, float] | None = None) -> Report | None:
    """The report of the passes of ``phase``; None if there were none."""
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
    return Report(
        phase=phase,
        passes=len(passes),
        tokens=sum(run.tokens for run in passes),
        seconds_per_pass=_seconds_per_pass(passes),
        rows=tuple(rows),
        links=alone or _busy(passes, spans),
        links_measured_alone=alone is not None,
    )


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


def render(reports: Sequence[Report | None], info: ReaderInfo | None) -> RenderableType:
    """A table for people: one block a phase, then the engine, the bound and the share of it reached."""
    parts: list[RenderableType] = []
    for report in reports:
        if report is not None:
            parts += [_table(report), Text(_bound_line(report))]
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


def _bound_line(report: Report) -> str:
    alone = report.links_measured_alone
    links = ", ".join(f"{link} {seconds * 1e3:.1f} ms" for link, seconds in report.links.items())
    rate = report.tokens / report.passes / report.seconds_per_pass
    lines = [
        f"  pass      {report.seconds_per_pass * 1e3:.1f} ms ({rate:.2f} tokens/s)",
        f"  links     {links} a pass, {'measured alone' if alone else 'busy in this run'}",
    ]
    if alone:
        lines.append(
            f"  bound     {report.bound_s * 1e3:.1f} ms, by {report.bound_link}: {report.share:.0%} of it reached"
        )
    else:
        lines.append(f"  busiest   {report.bound_link}, at work {report.share:.0%} of the time")
    return "\n".join(lines) + "\n"


def engine_line(info: ReaderInfo) -> str:
    """The engine and mode that really read, and each fallback with its reason."""
    mode = "O_DIRECT" if info.direct == "on" else "buffered"
    line = f"  engine    {info.engine}, {mode}"
    return "\n".join([line, *(f"  fallback  {reason}" for reason in info.reasons)])

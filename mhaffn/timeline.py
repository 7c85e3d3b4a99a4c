"""A picture of one pass: its steps one after the other, and as they were streamed, on the same scale."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mhaffn.config import KINDS, Kind
from mhaffn.errors import ConfigError
from mhaffn.trace import LANES, Lane, PassSpan, Span, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANE_TITLES: dict[Lane, str] = {"ssd": "SSD", "h2d": "H2D", "mha": "MHA", "ffn": "FFN"}
# Dark blue and light orange (Okabe and Ito): apart for colour-blind eyes, and in grey. The row says the lane.
COLOURS: dict[Kind, str] = {"mha": "#0072B2", "ffn": "#E69F00"}
OTHER_PASS = "#BBBBBB"
INCHES = (10.0, 4.8)
DPI = 200


def check_available() -> None:
    """Raises :class:`ConfigError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a timeline needs matplotlib ({error}): pip install 'mhaffn[report]'") from error


def draw(trace: Trace, path: str | Path, number: int | None = None) -> None:
    """Writes the timeline of pass ``number`` (the last decode pass, else the last of all) as a PNG file.

    Raises :class:`ConfigError` where matplotlib is missing, or the trace holds no such pass.
    """
    figure(trace, number).savefig(path, format="png", dpi=DPI)


def figure(trace: Trace, number: int | None = None) -> Figure:
    """The timeline as a matplotlib figure; see :func:`draw`."""
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    run, own, others = _choose(trace, number)
    start_s = min(run.start_s, *(span.start_s for span in own if span.lane in KINDS))
    serial, streamed = one_after_the_other(own), [_shifted(span, -start_s) for span in own]
    serial_s = max(span.end_s for span in serial)
    streamed_s = max(span.end_s for span in streamed)
    unit, scale = ("s", 1.0) if max(serial_s, streamed_s) >= 10 else ("ms", 1e3)

    made = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(made)
    above, below = made.subplots(2, 1, sharex=True)
    above.set_title(f"one after the other: {serial_s * scale:.1f} {unit}", loc="left", fontsize=11)
    times = streamed_s / serial_s
    against = f"{1 / times:.2f}× faster" if times <= 1 else f"{times:.2f}× as long"
    below.set_title(f"streamed: {streamed_s * scale:.1f} {unit}, {against}", loc="left", fontsize=11)
    _bars(below, [_shifted(span, -start_s) for span in others], scale, OTHER_PASS)
    for axes, spans in ((above, serial), (below, streamed)):
        for kind in KINDS:
            _bars(axes, [span for span in spans if span.sublayer.kind == kind], scale, COLOURS[kind])
        _lanes(axes)
    below.set_xlim(0, max(serial_s, streamed_s) * scale)
    below.set_xlabel(unit)
    entries = [Patch(facecolor=COLOURS[kind], label=f"{kind.upper()} sublayers") for kind in KINDS]
    if others:
        entries.append(Patch(facecolor=OTHER_PASS, label="for the next pass"))
    made.suptitle(f"{run.phase}, {run.tokens} token{'s' if run.tokens != 1 else ''}, pass {run.number}", fontsize=12)
    made.legend(handles=entries, loc="outside lower right", ncols=len(entries), frameon=False, fontsize=9)
    return made


def one_after_the_other(spans: Sequence[Span]) -> list[Span]:
    """The same work without overlap, from time 0: each sublayer is read, copied and computed before the next."""
    order = {span.sublayer: span.start_s for span in spans if span.lane in KINDS}
    sequence = sorted(
        (span for span in spans if span.sublayer in order),
        key=lambda span: (order[span.sublayer], LANES.index(span.lane), span.start_s),
    )
    laid, end_s = [], 0.0
    for _, steps in groupby(sequence, key=lambda span: (span.sublayer, span.lane)):
        for span in steps:
            laid.append(_shifted(span, end_s - span.start_s))
            end_s = laid[-1].end_s
    return laid


def _choose(trace: Trace, number: int | None) -> tuple[PassSpan, list[Span], list[Span]]:
    """The pass, its spans, and the transfers for other passes meanwhile."""
    kept = [run for phase in ("prefill", "decode") for run in trace.kept(phase)[0]]
    runs = [run for run in kept if number in (None, run.number)]
    if not runs:
        held = ", ".join(str(run.number) for run in kept) or "none"
        raise ConfigError(f"the trace holds no whole pass{'' if number is None else f' {number}'}; it holds {held}")
    run = runs[-1]
    spans = list(trace.spans)
    own = [span for span in spans if span.number == run.number]
    if not any(span.lane in KINDS for span in own):
        raise ConfigError(f"pass {run.number} of the trace holds no compute to draw")
    end_s = max(span.end_s for span in own)
    others = [span for span in spans if span.number != run.number and run.start_s < span.end_s and span.start_s < end_s]
    return run, own, [span for span in others if span.lane not in KINDS]


def _shifted(span: Span, by_s: float) -> Span:
    return Span(span.lane, span.sublayer, span.number, span.start_s + by_s, span.end_s + by_s, span.nbytes)


def _bars(axes: Axes, spans: Sequence[Span], scale: float, colour: str) -> None:
    for lane in LANES:
        bars = [(span.start_s * scale, (span.end_s - span.start_s) * scale) for span in spans if span.lane == lane]
        row = len(LANES) - LANES.index(lane)
        # Bars narrower than a pixel: a link's many chunks shade its lane by how busy it is, single computes stay seen.
        edge_points = 0.5 if lane in KINDS else 0.0
        axes.broken_barh(bars, (row - 0.4, 0.8), color=colour, linewidth=edge_points, snap=False)


def _lanes(axes: Axes) -> None:
    rows = [len(LANES) - LANES.index(lane) for lane in LANES]
    axes.set_yticks(rows, [LANE_TITLES[lane] for lane in LANES])
    axes.set_ylim(0.4, len(LANES) + 0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.3, color="#999999")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)

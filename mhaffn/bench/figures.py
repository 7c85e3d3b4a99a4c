"""The document's figures as PNG files: for screens and print, for every eye.

Colours are Okabe and Ito's, told apart by people who see colours differently; MHA and FFN differ in hatching too, so
that they do in grey. matplotlib is imported when a figure is drawn, and may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhaffn.bench import numbers as n
from mhaffn.bench.read import Report
from mhaffn.bench.words import Language, Words
from mhaffn.config import KINDS, Kind
from mhaffn.forecast import PHASES
from mhaffn.trace import Phase

COLOURS = {"mha": "#0072B2", "ffn": "#E69F00"}
HATCHES = {"mha": "", "ffn": "////"}
LINK_COLOURS = {"compute": "#009E73", "h2d": "#CC79A7", "ssd": "#56B4E9"}
GREY = "#444444"
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Serif CJK SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "SimHei", "Microsoft YaHei", "PingFang SC", "Droid Sans Fallback", "AR PL UMing CN",
)  # fmt: skip
DPI = 160
THINNEST = 0.002
"""The least part of a timeline's width that shows where nothing else is near."""
RIGHT_OF = 30
"""Operations a byte above which a point of the roofline has its label on the left."""
NAMES = ("shares", "roofline", "io", "timelines")
LANES = {"ssd": ("ssd",), "h2d": ("h2d",), "compute": ("mha", "ffn")}


class NoMatplotlibError(ImportError):
    """matplotlib is not installed: ``pip install 'mhaffn[report]'``."""


def draw(raw: Mapping[str, Any], folder: Path, language: Language) -> tuple[list[str], list[str]]:
    """Writes the figures into ``folder``; their names, and keys of what there is to say about them.

    Raises :class:`NoMatplotlibError`.
    """
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError as error:
        raise NoMatplotlibError(str(error)) from error
    remarks = []
    family = ["DejaVu Sans"]
    if language == "zh":
        known = {font.name for font in font_manager.fontManager.ttflist}
        chinese = [name for name in CHINESE_FONTS if name in known]
        if chinese:
            family = [chinese[0], *family]
        else:
            language, remarks = "en", ["no_chinese_font"]
    report, words = Report(raw), Words(language)
    style: Any = {"font.family": family, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
             "hatch.linewidth": 0.6, "axes.titlesize": 10, "axes.titleweight": "bold"}  # fmt: skip
    pictures: tuple[Callable[[Report, Words], Any], ...] = (_shares, _roofline, _io, _timelines)
    with matplotlib.rc_context(style):
        for name, picture in zip(NAMES, pictures, strict=True):
            figure = picture(report, words)
            figure.suptitle(f"{words('f.' + name)} — {_where(report)}", fontsize=11)
            figure.savefig(folder / f"{name}.png", dpi=DPI)
    return list(NAMES), remarks


def _where(report: Report) -> str:
    gpu = report.machine["gpu"]
    chip = report.machine["cpu"] if gpu is None or report.settings["device"] == "cpu" else gpu["name"]
    return f"{report.settings['shape']}, {chip}"


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _phase(words: Words, report: Report, phase: Phase) -> str:
    return words(phase, tokens=report.settings["tokens"])


def _shares(report: Report, words: Words) -> Any:
    """Stacked bars: who computes, and who takes the serial time."""
    figure, axes = _new(9, 3.6, 2)
    for phase, y in zip(PHASES, (1, 0), strict=True):
        left = 0.0
        for kind in KINDS:
            share = report.derived(f"{phase}.share.{kind}").value
            _part(axes[0][0], y, left, share, kind.upper(), COLOURS[kind], HATCHES[kind])
            left += share
        left = 0.0
        for link in LINK_COLOURS:
            for kind in KINDS:
                share = report.derived(f"{phase}.serial_share.{link}.{kind}").value
                label = f"{kind.upper()} {words('link.' + link)}"
                _part(axes[1][0], y, left, share, label, LINK_COLOURS[link], HATCHES[kind])
                left += share
    for axis, title in ((axes[0][0], "f.compute_share"), (axes[1][0], "f.serial_share")):
        axis.set_title(words(title), loc="left")
        axis.set_yticks((1, 0), [_phase(words, report, phase) for phase in PHASES])
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    links = {words(f"link.{link}"): LINK_COLOURS[link] for link in reversed(_lanes(report))}
    kinds = [HATCHES[kind] for kind in KINDS]
    _legend(axes[0][0], {kind.upper(): COLOURS[kind] for kind in KINDS}, kinds)
    _legend(axes[1][0], links | {kind.upper(): "#cccccc" for kind in KINDS}, [""] * len(links) + kinds)
    return figure


def _legend(axis: Any, colours: Mapping[str, str], hatches: Sequence[str]) -> None:
    """Above the axis, to the right: a patch for each name."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name)
        for (name, colour), hatch in zip(colours.items(), hatches, strict=True)
    ]
    axis.legend(
        handles=handles, frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles),
        borderaxespad=0.2,
    )  # fmt: skip


def _part(axis: Any, y: float, left: float, share: float, label: str, colour: str, hatch: str) -> None:
    if share <= 0:
        return
    axis.barh(y, share, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.72)
    text = f"{label}\n{share:.1%}" if share > _width(label) else f"{share:.0%}"
    if share > _width(text.rpartition("\n")[2]):
        axis.text(
            left + share / 2, y, text, ha="center", va="center", fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip


def _width(text: str) -> float:
    """Of the axis that a label of :func:`_shares` takes, at most; Chinese characters are twice as wide."""
    return 0.006 + 0.0088 * sum(2 if ord(letter) > 0x2E80 else 1 for letter in text)


def _io(report: Report, words: Words) -> Any:
    """Bars on a logarithmic scale: each sublayer's compute by phase, and its two transfers."""
    figure, axes = _new(8, 3.8)
    axis = axes[0][0]
    columns = [(f"compute.{phase}", "compute", f"{words('link.compute')}\n{phase}") for phase in PHASES]
    columns += [(link, link, words(f"link.{link}")) for link in ("h2d", "ssd") if report.has(f"{link}.mha")]
    for number, (name, _, _) in enumerate(columns):
        for kind, shift in zip(KINDS, (-0.2, 0.2), strict=True):
            found = report.summary(f"{name}.{kind}").figure
            axis.bar(
                number + shift, found.value, 0.38, color=COLOURS[kind], hatch=HATCHES[kind], edgecolor="white",
                label=kind.upper() if number == 0 else None,
                yerr=[[found.value - found.low], [found.high - found.value]],
                error_kw={"ecolor": GREY, "capsize": 3, "lw": 1},
            )  # fmt: skip
            axis.annotate(
                n.plain(found.value), (number + shift, max(found.value, found.high)), ha="center", va="bottom",
                fontsize=8, xytext=(0, 2), textcoords="offset points",
            )  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylabel(words("f.ms_log"))
    axis.set_xticks(range(len(columns)), [label for _, _, label in columns])
    axis.margins(y=0.15)
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def _timelines(report: Report, words: Words) -> Any:
    """For each phase: one layer one step after the other, and what the links did in an executed pass."""
    figure, axes = _new(10, 6.4, 4)
    for number, phase in enumerate(PHASES):
        _serial(axes[2 * number][0], report, words, phase)
        _executed(axes[2 * number + 1][0], report, words, phase)
    return figure


def _serial(axis: Any, report: Report, words: Words, phase: Phase) -> None:
    lanes = _lanes(report)
    busy = dict.fromkeys(lanes, 0.0)
    steps: list[tuple[str, Kind, float]] = []
    for kind in KINDS:
        for link in lanes:
            ms = report.values[f"compute.{phase}.{kind}" if link == "compute" else f"{link}.{kind}"]
            steps.append((link, kind, ms))
            busy[link] += ms
    total, at = sum(busy.values()), 0.0
    for link, kind, ms in steps:
        _span(axis, lanes.index(link), kind, at, max(ms, total * THINNEST), total)
        at += ms
    bound = report.derived(f"{phase}.bound").value
    title = f"{_phase(words, report, phase)}, {words('f.serial')}: {n.ms(total)}; {words('f.bound')}: {n.ms(bound)}"
    _finish(axis, words, busy, total, title)
    axis.axvline(bound, color=GREY, ls="--", lw=1.2)


def _executed(axis: Any, report: Report, words: Words, phase: Phase) -> None:
    lanes = _lanes(report)
    line = report.raw["timelines"].get(phase)
    if line is None:
        axis.set_axis_off()
        return
    window, layers = line["window_ms"], report.settings["streamed_layers"]
    busy = dict.fromkeys(lanes, 0.0)
    for link, own in LANES.items():
        spans = sorted((start, end, key) for lane, key, start, end in line["spans"] if lane in own)
        starts = [*(start for start, *_ in spans[1:]), math.inf]
        done = 0.0
        for (start, end, key), following in zip(spans, starts, strict=False):
            kind, width = key.partition(".")[2], end - start
            busy[link] += max(0.0, end - max(start, done))
            done = max(done, end)
            if following - end > 4 * window * THINNEST:  # else a lane would look busier than it was
                width = max(width, window * THINNEST)
            _span(axis, lanes.index(link), kind, start, width, window)
    title = f"{words('f.executed', layers=layers)}: {n.ms(window)}, {layers} × {n.ms(window / layers)}"
    _finish(axis, words, busy, window, f"{_phase(words, report, phase)}, {title}")


def _span(axis: Any, lane: int, kind: Kind, start: float, width: float, window: float) -> None:
    wide: dict[str, Any] = {"hatch": HATCHES[kind], "edgecolor": "white", "linewidth": 0.4}
    edge = wide if width > window * 0.01 else {"linewidth": 0}
    axis.broken_barh([(start, width)], (lane - 0.4, 0.8), facecolor=COLOURS[kind], **edge)


def _lanes(report: Report) -> list[str]:
    return [link for link in ("ssd", "h2d", "compute") if link == "compute" or report.has(f"{link}.mha")]


def _finish(axis: Any, words: Words, busy: Mapping[str, float], end: float, title: str) -> None:
    """``busy``: milliseconds that each lane was at work."""
    axis.set_yticks(range(len(busy)), [f"{words('link.' + link)}: {n.ms(ms)}" for link, ms in busy.items()], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, end)
    axis.set_xlabel(words("f.ms"), fontsize=8)
    axis.set_title(title, loc="left")
    _legend(axis, {kind.upper(): COLOURS[kind] for kind in KINDS}, [HATCHES[kind] for kind in KINDS])


def _roofline(report: Report, words: Words) -> Any:
    """Operations a second over operations a byte, under the roofs measured in the same run, with each one's share."""
    figure, axes = _new(7, 4.4)
    axis = axes[0][0]
    roofs = {name: report.summary(f"roof.{name}").figure.value for name in ("memory", "matmul")}
    points = []
    for phase, marker in zip(PHASES, ("s", "o"), strict=True):
        rates = {kind: report.derived(f"{phase}.flop_rate.{kind}") for kind in KINDS}
        higher = max(KINDS, key=lambda kind: rates[kind].value)
        for kind, rate in rates.items():
            intensity = report.facts.flops(phase, kind) / report.facts.bytes_read(kind)
            points.append((intensity, rate.value))
            reached = rate.value / min(roofs["matmul"], intensity * roofs["memory"])
            side, shift = ("right", -14) if intensity > RIGHT_OF else ("left", 30)
            axis.annotate(  # below the roof, and apart from the other's, which may lie in the same place
                f"{kind.upper()} {phase}: {n.share(reached)}", (intensity, rate.value), ha=side, va="center",
                fontsize=8, xytext=(shift, -14 if kind == higher else -27), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "relpos": (float(shift < 0), 0.5)},
            )  # fmt: skip
            axis.errorbar(
                intensity, rate.value, yerr=[[rate.value - rate.low], [rate.high - rate.value]], fmt=marker, ms=8,
                color=COLOURS[kind], mec="black", ecolor=GREY, capsize=3,
            )  # fmt: skip
    ridge = roofs["matmul"] / roofs["memory"]
    low, high = min(0.5, *(x for x, _ in points)) / 2, max(ridge, *(x for x, _ in points)) * 4
    axis.plot([low, ridge, high], [low * roofs["memory"], roofs["matmul"], roofs["matmul"]], color="black", lw=1.5)
    axis.annotate(
        f"{words('roof.matmul')}: {n.flops(report.summary('roof.matmul').figure)}", (high, roofs["matmul"]),
        ha="right", va="bottom", fontsize=8, xytext=(0, 3), textcoords="offset points",
    )  # fmt: skip
    axis.annotate(
        f"{words('roof.memory')}: {n.rate(report.summary('roof.memory').figure)}", (low, low * roofs["memory"]),
        ha="left", va="top", fontsize=8, xytext=(4, -5), textcoords="offset points",
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    lowest = min(*(y for _, y in points), low * roofs["memory"])
    decades = math.log10(roofs["matmul"] / lowest)
    axis.set_ylim(lowest / 10 ** (0.2 * decades), roofs["matmul"] * 10 ** (0.1 * decades))  # labels lie inside
    axis.set_xlabel(words("f.intensity"))
    axis.set_ylabel(words("f.flops"))
    axis.grid(True, which="major", lw=0.3, color="#bbbbbb")
    return figure

"""Two reports side by side: two machines, or two commits on one.

A measurement differs where the ratio of the two values is greater than their uncertainties explain. On one machine
that is not yet the code's doing: the machine may have been busy. So the time in which threads waited for a processor is
taken out, and each measurement is held, round by round, against the roofs measured in the same round. It counts as
better or worse only where it still differs in all these ways, and by more than the roofs themselves moved.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table

from mhaffn.bench import numbers as n
from mhaffn.bench.read import Report
from mhaffn.errors import ConfigError
from mhaffn.samples import Figure, figure

Verdict = Literal["same", "better", "worse", "machine"]
ROOFS_OF = {"compute": ("matmul", "memory"), "h2d": ("h2d",), "ssd": ("ssd",)}
ALIKE = ("shape", "tokens", "device")
MARKS: dict[Verdict, str] = {"same": "", "better": "[green]better[/]", "worse": "[red]WORSE[/]", "machine": "machine"}


@dataclass(frozen=True)
class Difference:
    """One measurement in both runs. ``change`` is how much longer it takes in the second (of a roof: how much slower).

    "machine" means that the times differ, but that the machine's own state explains it.
    """

    name: str
    first: Figure
    second: Figure
    verdict: Verdict

    @property
    def change(self) -> float:
        ratio = self.second.value / self.first.value
        return 1 / ratio - 1 if self.name.startswith("roof.") else ratio - 1

    @property
    def apart(self) -> bool:
        return _apart(self.first, self.second)


def compare(first: Report, second: Report) -> list[Difference]:
    """Every measurement that both have; raises :class:`ConfigError` where they are not of the same thing."""
    for name in ALIKE:
        if first.settings[name] != second.settings[name]:
            raise ConfigError(
                f"the reports are not of the same thing: {name} is {first.settings[name]} and {second.settings[name]}. "
                f"Measure both with the same --shape, --tokens and --device."
            )
    if first.config != second.config:
        raise ConfigError("the reports are of models of different widths")
    shared = [name for name in first.measured if name in second.measured]
    return [_difference(name, first, second) for name in shared]


def same_machine(first: Report, second: Report) -> bool:
    return all(first.machine[part] == second.machine[part] for part in ("cpu", "cores", "gpu"))


def _difference(name: str, first: Report, second: Report) -> Difference:
    a, b = _figure(first, name), _figure(second, name)
    slower = b.value < a.value if name.startswith("roof.") else b.value > a.value
    verdict: Verdict = "same"
    if _apart(a, b):
        verdict = "worse" if slower else "better"
        if name.startswith("roof.") or (same_machine(first, second) and _machines_doing(name, first, second)):
            verdict = "machine"
    return Difference(name, a, b, verdict)


def _figure(report: Report, name: str) -> Figure:
    """The median over rounds and its interval; also of roofs, since here they stand for how busy the machine was."""
    return figure(_medians(report, name))


def _medians(report: Report, name: str) -> list[float]:
    return [statistics.median(samples) for samples in report.measured[name]]


def _machines_doing(name: str, first: Report, second: Report) -> bool:
    """Whether a busy processor, or the roofs of the parts that ``name`` uses, explain the difference."""
    wanted = ROOFS_OF.get(name.partition(".")[0], ("matmul", "memory", "h2d", "ssd"))
    roofs = [f"roof.{roof}" for roof in wanted if first.has(f"roof.{roof}") and second.has(f"roof.{roof}")]
    a, b = _figure(first, name), _figure(second, name)
    change = max(a.value, b.value) / min(a.value, b.value) - 1
    slower = b.value > a.value
    others = [[figure(_without_waits(report, name)) for report in (first, second)]]
    others += [[figure(_against(report, name, roof)) for report in (first, second)] for roof in roofs]
    if any(not _apart(*pair) or (pair[1].value > pair[0].value) != slower for pair in others):
        return True
    return any(change <= _figure(report, roof).relative for report in (first, second) for roof in roofs)


def _without_waits(report: Report, name: str) -> list[float]:
    """Milliseconds round by round, less those in which a thread waited for a processor."""
    waited = report.raw.get("waited", {}).get(name, [])
    return [ms * (1 - share) for ms, share in zip(_medians(report, name), waited, strict=False)] or _medians(
        report, name
    )


def _against(report: Report, name: str, roof: str) -> list[float]:
    """Time by roof, round by round: what is left of a difference when the machine's own is taken out."""
    return [ms * rate for ms, rate in zip(_medians(report, name), _medians(report, roof), strict=False)]


def _apart(a: Figure, b: Figure) -> bool:
    """Whether the values differ by more than both uncertainties together.

    By ratios: noise multiplies times, and an interval that reaches far up would hide any slow-down as a difference.
    """
    return abs(math.log(a.value / b.value)) > _factor(a) + _factor(b)


def _factor(found: Figure) -> float:
    """The logarithm of the greater ratio between the value and an end of its interval."""
    return math.log(max(found.high / found.value, found.value / found.low))


def regressions(found: Sequence[Difference], percent: float) -> list[Difference]:
    """What became worse by more than ``percent``."""
    return [item for item in found if item.verdict == "worse" and item.change * 100 > percent]


def remarks(first: Report, second: Report, found: Sequence[Difference]) -> list[str]:
    """What a reader must know before drawing conclusions."""
    lines = []
    if not same_machine(first, second):
        lines.append("two different machines: better and worse speak of the times alone, not of the code")
    elif first.machine.get("disk") != second.machine.get("disk"):
        lines.append("two different disks: what reads from them differs with them")
    for number, report in enumerate((first, second), 1):
        about = {item["what"]: item["why"] for item in report.raw["left_out"]}
        if "noisy" in about:
            lines.append(f"run {number}: the machine was not steady: {about['noisy']}")
        if "busy" in about:
            lines.append(f"run {number}: other programs ran beside it, up to {about['busy']} of the time")
        if alone := report.measured.keys() - (second if number == 1 else first).measured.keys():
            lines.append(f"run {number} alone has {', '.join(sorted(alone))}: nothing to hold it against")
    if any(item.verdict == "machine" and not item.name.startswith("roof.") for item in found):
        lines.append("machine: the times differ, but no more than a busy machine explains; measure again, quieter")
    if first.settings["rounds"] != second.settings["rounds"] or first.settings["quick"] != second.settings["quick"]:
        lines.append("the runs differ in rounds or in --quick: intervals are not equally wide")
    return lines


def render(first: Report, second: Report, found: Sequence[Difference]) -> Table:
    """Side by side: values with their uncertainty, the change, and whether it is one."""
    names = [f"{report.machine['commit'] or 'run'} {report.machine['date'][:16]}" for report in (first, second)]
    title = escape(f"{first.settings['shape']}: {names[0]} against {names[1]}")
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "first", "second", "change", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for item in found:
        sides = (_shown(item.name, side) for side in (item.first, item.second))
        table.add_row(escape(item.name), *sides, f"{item.change:+.1%}", MARKS[item.verdict])
    return table


def _shown(name: str, found: Figure) -> str:
    unit, scale = (" ms", 1.0) if not name.startswith("roof.") else (" GiB/s", 2.0**-30)
    if name == "roof.matmul":
        unit, scale = " GFLOP/s", 1e-9
    return f"{n.plain(found.value * scale)}{unit} ±{found.relative:.0%}"

"""What repeated measurements say together, and how sure it is.

Measurements are taken in rounds: each round measures everything once more, by turns, so that a machine that drifts
shows in the differences between rounds. A figure is the median of the rounds' medians. Its interval runs over all of
them but the sixth that is lowest and the sixth that is highest, so that twelve rounds of one machine and twelve more
of the same one hardly ever have intervals that do not meet. It is never narrower than :data:`BETWEEN_RUNS` either way,
because what changes from run to run does not show within one. A roof, whose name starts with ``roof.``, is the
highest rate seen, in a round and in all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BETWEEN_RUNS = 0.02
Rounds = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """A value with its interval, all in the unit of the samples."""

    value: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """The greater distance from the value to an end of its interval."""
        return max(self.high - self.value, self.value - self.low)

    @property
    def relative(self) -> float:
        return self.uncertainty / abs(self.value) if self.value else 0.0


@dataclass(frozen=True)
class Summary:
    """All samples of one measurement: the figure, and mean, extremes and standard deviation."""

    figure: Figure
    mean: float
    least: float
    most: float
    deviation: float
    count: int


def typical(name: str, samples: Sequence[float]) -> float:
    """The one value that stands for ``samples``."""
    return max(samples) if name.startswith("roof.") else statistics.median(samples)


def values(measured: Mapping[str, Rounds]) -> dict[str, float]:
    """The value of each measurement over all rounds."""
    return {name: summarise(name, rounds).figure.value for name, rounds in measured.items()}


def trimmed(rounds: int) -> int:
    """How many of the lowest rounds, and of the highest, an interval leaves out."""
    return rounds // 6


def figure(by_round: Sequence[float], value: float | None = None) -> Figure:
    """The figure that one value a round gives; ``value`` where it is known otherwise than as their median."""
    ordered = sorted(by_round)
    value = statistics.median(ordered) if value is None else value
    cut = trimmed(len(ordered))
    inner = ordered[cut : len(ordered) - cut]
    margin = abs(value) * BETWEEN_RUNS
    return Figure(value, min(inner[0], value - margin), max(inner[-1], value + margin))


def summarise(name: str, rounds: Rounds) -> Summary:
    """What the samples of the measurement ``name`` say; there must be at least one."""
    flat = [sample for samples in rounds for sample in samples]
    each = [typical(name, samples) for samples in rounds]
    return Summary(
        figure=figure(each, typical(name, each)),
        mean=statistics.fmean(flat),
        least=min(flat),
        most=max(flat),
        deviation=statistics.stdev(flat) if len(flat) > 1 else 0.0,
        count=len(flat),
    )


def by_round(measured: Mapping[str, Rounds]) -> list[dict[str, float]]:
    """The values of all measurements, round by round, as far as every measurement goes."""
    number = min((len(rounds) for rounds in measured.values()), default=0)
    return [{name: typical(name, rounds[i]) for name, rounds in measured.items()} for i in range(number)]

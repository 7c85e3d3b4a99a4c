"""The second half of the document: what the figures mean, what to change, split against whole, the conclusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mhaffn.bench import numbers as n
from mhaffn.bench.numbers import table
from mhaffn.bench.read import Report
from mhaffn.bench.words import Words
from mhaffn.config import KINDS
from mhaffn.forecast import PHASES
from mhaffn.samples import Figure
from mhaffn.trace import Phase

WORTH_SAYING = 1.02
PAIRED = ("compute.prefill", "compute.decode", "h2d", "ssd")


def insight(report: Report, words: Words, shown: dict[str, str]) -> Iterator[str]:
    yield f"\n## {words('insight')}"
    yield f"\n### 1. {words('nature')}"
    yield from _nature(report, words)
    yield f"\n### 2. {words('balance')}\n"
    for phase in PHASES:
        yield from (f"- {line}" for line in _balance(report, words, phase))
    yield f"\n### 3. {words('changes', layers=report.config.num_layers)}\n"
    yield from _changes(report, words)
    yield f"\n### 4. {words('split')}"
    yield from _split(report, words)
    yield f"\n## {words('conclusion')}\n"
    for number, line in enumerate(_conclusion(report, words), 1):
        yield f"{number}. {line}"


def _nature(report: Report, words: Words) -> list[str]:
    rows = [
        [words(f"{phase}_share"), *(n.share_with_margin(report.derived(f"{phase}.share.{kind}")) for kind in KINDS)]
        for phase in PHASES
    ]
    whole = report.facts.nbytes("layer")
    sizes = [report.facts.nbytes(kind) for kind in KINDS]
    rows.append([words("weight_size"), *(f"{n.gib(size)} ({size / whole:.0%})" for size in sizes)])
    intensity = [report.facts.flops("prefill", kind) / size for kind, size in zip(KINDS, sizes, strict=True)]
    rows.append([words("intensity"), *(f"{value:.0f}" for value in intensity)])
    return table([words("trait"), "MHA", "FFN"], rows)


def _balance(report: Report, words: Words, phase: Phase) -> Iterator[str]:
    (link, ms), (following, next_ms) = report.links(phase)[:2]
    yield words(
        "balance_bound", phase=phase, link=words(f"link.{link}"), ms=n.ms(ms), next_ms=n.ms(next_ms),
        next=words(f"link.{following}"),
    )  # fmt: skip
    if link == "ssd":
        wanted = n.rate(report.derived(f"{phase}.ssd_wanted"))
        yield words("ssd_wanted", phase=phase, speed=wanted, now=n.rate(report.derived("rate.ssd.row")))


def _changes(report: Report, words: Words) -> Iterator[str]:
    budgets = {"GPU": report.settings["gpu_bytes"], "DRAM": report.settings["dram_bytes"]}
    memory = ", ".join(f"{name} {n.gib(budget)}" for name, budget in budgets.items() if budget)
    yield words("changes_line")
    heads = [f"{phase}: {words(head)}" for phase in PHASES for head in ("seconds", "bound_by", "gain")]
    for situation, items in report.raw["outlook"].items():
        yield f"\n**{_situation(report, words, situation, memory)}**"
        yield from table([words("change"), "GPU/DRAM/SSD", *heads], [_change(words, item) for item in items])
        yield from (f"- {line}" for line in _advice(report, words, situation))


def _situation(report: Report, words: Words, situation: str, memory: str) -> str:
    name = words("situation." + situation.removeprefix("published_"), memory=memory)
    published = report.facts.published
    if situation.startswith("published_") and published is not None:
        return words(
            "situation.published", model=published.name, width=published.config.intermediate_size,
            measured=report.config.intermediate_size, situation=name,
        )  # fmt: skip
    return name


def _change(words: Words, item: Mapping[str, Any]) -> list[str]:
    name = words.or_as_is(item["name"])
    row = [
        name,
        "/".join(str(count) for count in item["tiers"].values()),
    ]
    for phase in PHASES:
        row += [f"{item['seconds'][phase]:.3f}", words.or_as_is(item["binding"][phase]), f"{item['gain'][phase]:.2f}×"]
    return row


def _advice(report: Report, words: Words, situation: str) -> Iterator[str]:
    """The change with the greatest computed gain, by phase, or that none helps."""
    items = report.raw["outlook"][situation]
    for phase in PHASES:
        best = max((item for item in items[1:]), key=lambda item: item["gain"][phase])
        if best["gain"][phase] > WORTH_SAYING:
            name = words.or_as_is(best["name"])
            yield words("most_help", phase=phase, name=name, gain=f"{best['gain'][phase]:.2f}×")
        else:
            yield words("no_help", phase=phase)


def _memory_gain(report: Report, words: Words) -> Iterator[str]:
    """What this machine's own memory brings over streaming everything."""
    if "memory" not in report.raw["outlook"]:
        return
    streamed, kept = (report.raw["outlook"][situation][0]["seconds"] for situation in ("ssd", "memory"))
    for phase in PHASES:
        if streamed[phase] / kept[phase] > WORTH_SAYING:
            yield words(
                "memory_helps", phase=phase, seconds=f"{kept[phase]:.3f}", ssd_seconds=f"{streamed[phase]:.3f}",
                gain=f"{streamed[phase] / kept[phase]:.2f}×",
            )  # fmt: skip


def _split(report: Report, words: Words) -> Iterator[str]:
    rows: list[list[str]] = []
    same: list[str] = []
    differ: list[str] = []
    for name in PAIRED:
        if not report.has_derived(f"split.{name}"):
            continue
        difference = report.derived(f"split_minus_whole.{name}")
        whole = report.summary(f"{name}.layer").figure
        share = difference.value / whole.value
        rows.append(
            [
                words(name), n.with_margin(whole), n.with_margin(report.derived(f"split.{name}")),
                f"{n.with_margin(difference)} ({share:+.1%})",
            ]
        )  # fmt: skip
        (same if _may_be_zero(difference, whole) else differ).append(words(name))
    for phase in PHASES:
        if report.has(f"pass.{phase}.whole"):
            whole, split = (report.summary(f"pass.{phase}.{how}").figure for how in ("whole", "split"))
            gap = split.value - whole.value
            apart = split.low > whole.high or whole.low > split.high
            rows.append(
                [
                    words(f"pass.{phase}"), n.with_margin(whole), n.with_margin(split),
                    f"{n.ms(gap)} ({gap / whole.value:+.1%})",
                ]
            )  # fmt: skip
            (differ if apart else same).append(words(f"pass.{phase}"))
    rings = report.raw["rings"]
    if "whole" in rings:
        sizes = [rings[how]["staging_bytes"] for how in ("whole", "split")]
        rows.append([words("staging"), *(n.gib(size) for size in sizes), f"{sizes[1] / sizes[0] - 1:+.0%}"])
    yield from table([words("figure"), words("whole"), words("sum"), words("difference")], rows)
    if same:
        yield words("same_within", names=", ".join(same))
    if differ:
        yield words("differ", names=", ".join(differ))


def _may_be_zero(difference: Figure, whole: Figure) -> bool:
    return difference.low <= 0 <= difference.high or abs(difference.value) <= whole.uncertainty


def _in(report: Report, words: Words, situation: str) -> str:
    name = words("in_" + situation.removeprefix("published_"))
    published = report.facts.published
    if situation.startswith("published_") and published is not None:
        return words("in_published", model=published.name, width=published.config.intermediate_size, situation=name)
    return name


def _conclusion(report: Report, words: Words) -> Iterator[str]:
    for phase in PHASES:
        yield words(
            "concluded", phase=phase, serial=n.with_margin(report.derived(f"{phase}.serial")),
            ideal=n.with_margin(report.derived(f"{phase}.ideal")),
            ideal_speedup=n.times(report.derived(f"{phase}.ideal_speedup")),
            bound=n.with_margin(report.derived(f"{phase}.bound")), link=words(f"link.{report.links(phase)[0][0]}"),
            executed=n.with_margin(report.summary(f"pass.{phase}.split").figure),
            reached=n.share_with_margin(report.derived(f"{phase}.reached.split")),
        )  # fmt: skip
    yield from _memory_gain(report, words)
    for situation in report.raw["outlook"]:
        for line in _advice(report, words, situation):
            yield _in(report, words, situation) + line

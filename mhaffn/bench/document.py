"""report.md: the document of one machine, in the order such measurements are read.

Every number comes from report.json through one rule, so both languages carry the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mhaffn.bench import numbers as n
from mhaffn.bench.derive import PARTS
from mhaffn.bench.insight import insight
from mhaffn.bench.numbers import table
from mhaffn.bench.read import Report
from mhaffn.bench.words import Language, Words
from mhaffn.config import KINDS
from mhaffn.forecast import PHASES
from mhaffn.samples import BETWEEN_RUNS, trimmed
from mhaffn.trace import Phase

LINKS = ("compute", "h2d", "ssd")
ROOFS = ("memory", "matmul", "h2d", "ssd")


def write(raw: dict[str, Any], language: Language, figures: Sequence[str]) -> str:
    """The document in ``language``; ``figures`` are the names of the PNG files beside it."""
    report, words = Report(raw), Words(language)
    shown = {name: f"![{words('f.' + name)}]({name}.png)" for name in figures}
    parts: list[str] = [f"# {words('title', shape=report.settings['shape'])}"]
    parts += _environment(report, words)
    parts += _weights(report, words)
    parts += _compute(report, words, shown)
    parts += _io(report, words)
    parts += _overlap(report, words, shown)
    parts += insight(report, words, shown)
    return "\n".join(parts) + "\n"


def _environment(report: Report, words: Words) -> Iterator[str]:
    machine, settings = report.machine, report.settings
    gpu = machine["gpu"]
    chip = words("no_gpu") if gpu is None or settings["device"] == "cpu" else f"{gpu['name']}, {gpu['memory_gib']} GiB"
    disk = ", ".join(value for value in machine["disk"].values() if value)
    reader = report.raw["reader"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    config = report.config
    yield f"\n## {words('environment')}\n"
    yield f"- **{words('machine')}**: {chip}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    yield f"- **{words('disk')}**: {disk}"
    yield f"- **{words('reader')}**: {reader['engine']}, {'O_DIRECT' if reader['direct'] == 'on' else 'buffered'}"
    yield f"- **{words('versions')}**: mhaffn {machine['mhaffn']} ({machine['commit']}), {versions}; {machine['date']}"
    model = words(
        "model_line", hidden=config.hidden_size, intermediate=config.intermediate_size, heads=config.num_heads,
        kv_heads=config.num_kv_heads, head_dim=config.head_dim, layers=config.num_layers,
    )  # fmt: skip
    yield f"- **{words('model')}**: {model}"
    cut = trimmed(settings["rounds"])
    method = words(
        "method_line",
        rounds=settings["rounds"],
        trimmed=words("trimmed", count=cut) if cut else "",
        floor=f"{BETWEEN_RUNS:.0%}",
        streamed=settings["streamed_layers"],
    )
    yield f"- **{words('method')}**: {method}"
    yield f"- {_memory(report, words)}"
    yield f"\n### {words('left_out')}\n"
    left = [words(item["what"], why=item["why"]) for item in report.raw["left_out"]]
    yield from (f"- {line}" for line in left or [words("nothing_left_out")])


def _memory(report: Report, words: Words) -> str:
    peak, needed = report.raw["memory"]["peak"], report.raw["memory"]["needed"]
    gpu = words("memory_gpu", gpu=n.gib(peak["gpu"]), gpu_needed=n.gib(needed["gpu"])) if needed["gpu"] else ""
    return words("memory_line", dram=n.gib(peak["dram"]), dram_needed=n.gib(needed["dram"]), gpu=gpu)


def _weights(report: Report, words: Words) -> Iterator[str]:
    yield f"\n## {words('weights')}\n"
    total = 0
    for kind in KINDS:
        held = report.raw["weights"][kind]
        total += held["bytes"]
        names = ", ".join(name for name in report.config.sublayer_shapes(kind) if name != "norm")
        line = words(
            "weights_line", kind=f"**{kind.upper()}**", size=n.gib(held["bytes"]), count=f"{held['parameters']:,}",
            names=names,
        )  # fmt: skip
        yield f"- {line}"
    yield f"- **{words('total')}**: {n.gib(total)}"


def _compute(report: Report, words: Words, shown: dict[str, str]) -> Iterator[str]:
    yield f"\n## {words('compute_time')}"
    for phase in PHASES:
        yield f"\n### {words(phase, tokens=report.settings['tokens'])}"
        yield from _compute_table(report, words, phase)
        larger = max(KINDS, key=lambda kind: report.values[f"compute.{phase}.{kind}"])
        weights = report.facts.nbytes(larger) / report.facts.nbytes("layer")
        line = words(
            "dominates", kind=larger.upper(), share=n.share(report.derived(f"{phase}.share.{larger}").value),
            phase=phase, weights=n.share(weights),
        )  # fmt: skip
        yield f"- {line}"
        spread = {kind: report.summary(f"compute.{phase}.{kind}") for kind in KINDS}
        widest = max(KINDS, key=lambda kind: spread[kind].deviation / spread[kind].mean)
        ratio = spread[widest].deviation / spread[widest].mean
        yield f"- {words('spread', kind=widest.upper(), deviation=n.share(ratio))}"
    yield f"\n### {words('versus')}"
    rows = [
        [name, *(n.with_margin(report.summary(f"compute.{phase}.{part}").figure) for part in PARTS)]
        for name, phase in (("Prefill", "prefill"), ("Decode", "decode"))
    ]
    rows.append([f"**{words('ratio')}**", *(n.times(report.derived(f"ratio.{part}")) for part in PARTS)])
    yield from table(["", "MHA", "FFN", words("whole_layer")], rows)
    for name in ("shares", "roofline"):
        if name in shown:
            yield f"\n{shown[name]}"


def _compute_table(report: Report, words: Words, phase: Phase) -> list[str]:
    roof = "matmul" if phase == "prefill" else "memory"
    heads = ["part", "time", "share", "mean", "least", "most", "deviation", "samples", "roof_share"]
    rows = []
    for part in PARTS:
        found = report.summary(f"compute.{phase}.{part}")
        rows.append(
            [
                f"**{part.upper()}**" if part in KINDS else words("whole_layer"),
                n.with_margin(found.figure),
                n.share_with_margin(report.derived(f"{phase}.share.{part}")) if part in KINDS else "",
                *(n.ms(value) for value in (found.mean, found.least, found.most, found.deviation)),
                str(found.count),
                n.share_with_margin(report.derived(f"{phase}.roof.{roof}.{part}")),
            ]
        )
    rows.append([f"**{words('total')}**", n.with_margin(report.derived(f"{phase}.compute")), "100.0%", *[""] * 6])
    return table([words(head) for head in heads], rows)


def _io(report: Report, words: Words) -> Iterator[str]:
    yield f"\n## {words('io')}"
    for link in ("h2d", "ssd"):
        yield f"\n### {words(link)}"
        if not report.has(f"{link}.mha"):
            yield f"\n{words('no_h2d')}"
            continue
        rows = []
        for part in PARTS:
            found = report.summary(f"{link}.{part}")
            rows.append(
                [
                    f"**{part.upper()}**" if part in KINDS else words("whole_layer"),
                    n.gib(report.facts.nbytes(part)), n.with_margin(found.figure),
                    n.rate(report.derived(f"rate.{link}.{part}")),
                    *(n.ms(value) for value in (found.mean, found.least, found.most, found.deviation)),
                    str(found.count), n.share_with_margin(report.derived(f"roof.{link}.{part}")),
                ]
            )  # fmt: skip
        heads = ["part", "weight_size", "time", "speed", "mean", "least", "most", "deviation", "samples", "roof_share"]
        yield from table([words(head) for head in heads], rows)
        if link == "ssd":
            row = n.with_margin(report.summary("ssd.row").figure)
            yield words("row_line", row=row, alone=n.with_margin(report.derived("split.ssd")))
    yield f"\n### {words('roofs')}"
    rows = [
        [words(f"roof.{roof}"), (n.flops if roof == "matmul" else n.rate)(report.summary(f"roof.{roof}").figure)]
        for roof in ROOFS
        if report.has(f"roof.{roof}")
    ]
    yield from table([words("roof"), words("speed")], rows)


def _overlap(report: Report, words: Words, shown: dict[str, str]) -> Iterator[str]:
    yield f"\n## {words('overlap')}"
    for phase in PHASES:
        yield f"\n### {words(phase, tokens=report.settings['tokens'])}"
        yield f"\n#### {words('serial')}\n\n```"
        yield words("serial_total", ms=n.with_margin(report.derived(f"{phase}.serial")))
        yield from _serial_parts(report, words, phase)
        yield f"```\n\n#### {words('within')}\n"
        for kind in KINDS:
            yield f"- {_within(report, words, phase, kind)}"
        yield f"\n#### {words('pipelines')}"
        yield from _pipelines(report, words, phase)
        yield f"#### {words('prefetch')}\n"
        yield from (f"- {line}" for line in _prefetch(report, words, phase))
    for name in ("io", "timelines"):
        if name in shown:
            yield f"\n{shown[name]}"


def _serial_parts(report: Report, words: Words, phase: Phase) -> Iterator[str]:
    parts = [
        (link, kind)
        for link in LINKS
        for kind in KINDS
        if link == "compute" or report.has(f"{link}.{kind}")
    ]  # fmt: skip
    for number, (link, kind) in enumerate(parts):
        name = f"compute.{phase}.{kind}" if link == "compute" else f"{link}.{kind}"
        share = report.derived(f"{phase}.serial_share.{link}.{kind}").value
        branch = "└─" if number == len(parts) - 1 else "├─"
        line = words(
            "serial_part", kind=kind.upper(), link=words(f"link.{link}"), ms=n.ms(report.values[name]),
            share=n.share(share),
        )  # fmt: skip
        yield f"{branch} {line}"


def _within(report: Report, words: Words, phase: Phase, kind: str) -> str:
    wait = report.derived(f"{phase}.wait.{kind}")
    return words(
        "not_hidden" if wait.value > 0 else "hidden",
        kind=f"**{kind.upper()}**",
        compute=n.ms(report.values[f"compute.{phase}.{kind}"]),
        io=n.with_margin(report.derived(f"{phase}.io.{kind}")),
        bound=n.with_margin(report.derived(f"{phase}.bound.{kind}")),
        wait=n.with_margin(wait),
    )


def _pipelines(report: Report, words: Words, phase: Phase) -> list[str]:
    bound = report.derived(f"{phase}.bound")
    link = words(f"link.{report.links(phase)[0][0]}")
    rows = [[words("p.serial"), n.with_margin(report.derived(f"{phase}.serial")), "1.00×", ""]]
    for name in ("ideal", "bound"):
        found = report.derived(f"{phase}.{name}")
        speedup = n.times(report.derived(f"{phase}.{name}_speedup"))
        reached = n.share(bound.value / found.value)
        rows.append([words(f"p.{name}", link=link), n.with_margin(found), speedup, reached])
    predicted = report.raw["predicted_ms"][phase]
    serial = report.derived(f"{phase}.serial").value
    rows.append([words("p.predicted"), n.ms(predicted), f"{serial / predicted:.2f}×", n.share(bound.value / predicted)])
    for granularity in ("split", "whole"):
        if report.has(f"pass.{phase}.{granularity}"):
            rows.append(
                [
                    f"**{words('p.' + granularity)}**",
                    n.with_margin(report.summary(f"pass.{phase}.{granularity}").figure),
                    n.times(report.derived(f"{phase}.executed_speedup.{granularity}")),
                    n.share_with_margin(report.derived(f"{phase}.reached.{granularity}")),
                ]
            )
    return table([words(head) for head in ("pipeline", "time", "speedup", "of_bound")], rows)


def _prefetch(report: Report, words: Words, phase: Phase) -> Iterator[str]:
    most = 0
    for kind in KINDS:
        count = round(report.derived(f"{phase}.prefetch.{kind}").value)
        most = max(most, count)
        hidden = report.derived(f"{phase}.wait.{kind}").value == 0
        yield words("prefetch_hidden" if hidden else "prefetch_line", kind=f"**{kind.upper()}**", count=count)
    if most > report.config.num_layers:
        yield words("prefetch_beyond", count=most, layers=report.config.num_layers)
    ring = report.raw["rings"]["split"]
    yield words(
        "prefetch_used", count=ring["prefetch"], staging=n.gib(ring["staging_bytes"]),
        reached=n.share_with_margin(report.derived(f"{phase}.reached.split")),
    )  # fmt: skip

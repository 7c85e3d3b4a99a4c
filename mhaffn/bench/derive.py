"""Everything in the document that is computed from measured times: the same rules for a whole run and for one round.

A run's value is derived from the medians over all rounds; its interval from the values that each round's medians give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer, order
from mhaffn.errors import BudgetError
from mhaffn.forecast import PHASES, Forecast, Machine, changes
from mhaffn.measured import Layer, Measured, analyse
from mhaffn.plan import TIERS, Plan
from mhaffn.samples import Rounds, by_round, figure
from mhaffn.samples import values as values_of
from mhaffn.shapes import PUBLISHED, SHAPES
from mhaffn.simulate import Links, Work, predict
from mhaffn.sizes import Sizes, Workload
from mhaffn.trace import Phase

PARTS: tuple[str, ...] = (*KINDS, "layer")
Values = Mapping[str, float]
UNSTEADY = 0.02
"""What a pass may be faster than its bound by before it is worth a remark."""


@dataclass(frozen=True)
class Facts:
    """What was measured: the model, positions of the prompt, layers streamed, budgets (None: none kept there)."""

    name: str
    config: ModelConfig
    tokens: int
    streamed_layers: int
    gpu: int | None
    dram: int | None
    copies: bool

    @property
    def published(self) -> Facts | None:
        """The published model that the shape stands for, where its FFN is of another width."""
        if self.name not in PUBLISHED:
            return None
        return replace(self, name=PUBLISHED[self.name], config=SHAPES[PUBLISHED[self.name]])

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.config, "bfloat16")

    def nbytes(self, part: str) -> int:
        """Bytes of a sublayer's weights, or of the layer's."""
        return sum(self.sizes.weights(Sublayer(0, kind)) for kind in KINDS if part in (kind, "layer"))

    def flops(self, phase: Phase, part: str) -> float:
        """Floating-point operations of a pass: two a weight and token, and causal attention over the prompt."""
        if part == "layer":
            return sum(self.flops(phase, kind) for kind in KINDS)
        T = self.tokens if phase == "prefill" else 1
        products = 2.0 * T * self.nbytes(part) / 2
        c = self.config
        seen = self.tokens / 2 if phase == "prefill" else self.tokens
        return products + (4.0 * T * seen * c.num_heads * c.head_dim if part == "mha" else 0.0)

    def bytes_read(self, part: str) -> float:
        """Bytes a decoded token reads: weights, and keys and values of the context."""
        cached = 4.0 * self.tokens * self.config.num_kv_heads * self.config.head_dim
        return self.nbytes(part) + (0.0 if part == "ffn" else cached)


def measured_of(facts: Facts, values: Values) -> Measured:
    """The medians as :mod:`mhaffn.measured` takes them; 0 ms for copies on a device without memory of its own."""
    return Measured(
        name=facts.name,
        config=facts.config,
        prompt_tokens=facts.tokens,
        compute_ms={phase: {kind: values[f"compute.{phase}.{kind}"] for kind in KINDS} for phase in PHASES},
        h2d_ms={kind: values.get(f"h2d.{kind}", 0.0) for kind in KINDS},
        ssd_ms={kind: values[f"ssd.{kind}"] for kind in KINDS},
        gpu=facts.gpu or 0,
        dram=facts.dram or 0,
        published_intermediate_size=None,
    )


def layers_of(facts: Facts, values: Values) -> dict[Phase, Layer]:
    """The analysis by phase. The bound takes reads in a row, as a stream makes them, not one by one."""
    return {
        phase: replace(layer, ssd_ms=values["ssd.row"]) for phase, layer in analyse(measured_of(facts, values)).items()
    }


def links_ms(layer: Layer) -> dict[str, float]:
    """What each link needs for a layer; the greatest is the bound."""
    found = {"ssd": layer.ssd_ms, "h2d": layer.h2d_ms, "compute": layer.total_compute_ms}
    return {link: ms for link, ms in found.items() if ms}


def derive(facts: Facts, values: Values) -> dict[str, float]:
    """All derived figures of one set of medians: ms, bytes a second, shares of 1, and ratios."""
    found: dict[str, float] = {}
    for phase, layer in layers_of(facts, values).items():
        found |= {f"{phase}.{name}": value for name, value in _of_phase(facts, layer, phase, values).items()}
    for part in PARTS:
        for link in ("ssd", "h2d"):
            if f"{link}.{part}" in values:
                found[f"rate.{link}.{part}"] = facts.nbytes(part) / values[f"{link}.{part}"] * 1e3
                found[f"roof.{link}.{part}"] = found[f"rate.{link}.{part}"] / values[f"roof.{link}"]
        found[f"ratio.{part}"] = values[f"compute.prefill.{part}"] / values[f"compute.decode.{part}"]
    found["rate.ssd.row"] = facts.nbytes("layer") / values["ssd.row"] * 1e3
    found["roof.ssd.row"] = found["rate.ssd.row"] / values["roof.ssd"]
    for name in ("compute.prefill", "compute.decode", "h2d", "ssd"):
        if f"{name}.layer" in values:
            split = sum(values[f"{name}.{kind}"] for kind in KINDS)
            found |= {f"split.{name}": split, f"split_minus_whole.{name}": split - values[f"{name}.layer"]}
    return found


def _of_phase(facts: Facts, layer: Layer, phase: Phase, values: Values) -> dict[str, float]:
    found = {
        "compute": layer.total_compute_ms, "serial": layer.serial_ms, "ideal": layer.ideal_ms,
        "ideal_speedup": layer.ideal_speedup, "bound": layer.bound_ms, "bound_speedup": layer.bound_speedup,
    }  # fmt: skip
    others = [ms for link, ms in links_ms(layer).items() if link != "ssd"]
    found["ssd_wanted"] = facts.nbytes("layer") / max(others) * 1e3
    for kind in KINDS:
        found |= {
            f"share.{kind}": layer.compute_share(kind),
            f"io.{kind}": layer.io_ms[kind],
            f"bound.{kind}": layer.sublayer_bound_ms(kind),
            f"wait.{kind}": layer.wait_ms(kind),
            f"prefetch.{kind}": float(layer.prefetch_layers(kind)),
            f"serial_share.compute.{kind}": layer.compute_ms[kind] / layer.serial_ms,
            f"serial_share.h2d.{kind}": values.get(f"h2d.{kind}", 0.0) / layer.serial_ms,
            f"serial_share.ssd.{kind}": values[f"ssd.{kind}"] / layer.serial_ms,
        }
    for part in PARTS:
        ms = values[f"compute.{phase}.{part}"]
        found[f"flop_rate.{part}"] = facts.flops(phase, part) / ms * 1e3
        found[f"roof.matmul.{part}"] = found[f"flop_rate.{part}"] / values["roof.matmul"]
        if phase == "decode":
            found[f"read_rate.{part}"] = facts.bytes_read(part) / ms * 1e3
            found[f"roof.memory.{part}"] = found[f"read_rate.{part}"] / values["roof.memory"]
    for granularity in ("split", "whole"):
        executed = values.get(f"pass.{phase}.{granularity}")
        if executed:
            found |= {
                f"executed.{granularity}": executed,
                f"reached.{granularity}": layer.bound_ms / executed,
                f"executed_speedup.{granularity}": layer.serial_ms / executed,
            }
    return found


def derived_figures(facts: Facts, measured: Mapping[str, Rounds]) -> dict[str, dict[str, float]]:
    """Each derived figure with its interval: ``value``, ``low``, ``high``."""
    rounds = [derive(facts, found) for found in by_round(measured)]
    return {
        name: asdict(figure([each[name] for each in rounds], value))
        for name, value in derive(facts, values_of(measured)).items()
    }


def machine_of(facts: Facts, values: Values, *, budgets: bool) -> Machine:
    """The machine as forecasts take it, with or without its memory for weights."""
    nbytes = facts.nbytes("layer")
    h2d = sum(values[f"h2d.{kind}"] for kind in KINDS) if facts.copies else None
    return Machine(
        links=Links(ssd=nbytes / values["ssd.row"] * 1e3, h2d=nbytes / h2d * 1e3 if h2d else None),
        compute_s={
            phase: {kind: values[f"compute.{phase}.{kind}"] / 1e3 for kind in KINDS} for phase in PHASES
        },
        gpu=facts.gpu if budgets and facts.copies else None,
        dram=facts.dram if budgets else None,
        work=Workload(tokens=facts.tokens, context=2 * facts.tokens),
    )  # fmt: skip


def predicted_ms(facts: Facts, values: Values, plan: Plan) -> dict[Phase, float]:
    """What the plan says that the executed passes should take, a layer."""
    machine = machine_of(facts, values, budgets=False)
    found: dict[Phase, float] = {}
    for phase in PHASES:
        work = {s: Work(facts.sizes.weights(s), machine.compute_s[phase][s.kind]) for s in order(facts.streamed_layers)}
        found[phase] = predict(plan, work, machine.links).seconds * 1e3 / facts.streamed_layers
    return found


def faster_than_the_link(derived: Mapping[str, Mapping[str, float]]) -> float:
    """By how much executed passes were surely faster than their bound, 0 where they were not: a share of the bound."""
    least = [derived.get(f"{phase}.reached.split", {}).get("low", 0.0) - 1 for phase in PHASES]
    return max([0.0, *(over for over in least if over > UNSTEADY)])


def outlook(facts: Facts, values: Values) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The whole model as measured ("ssd": all of it there) and within the budgets ("memory"), each with each change
    to it; and why the second is missing, if it is.

    Where the shape stands for a published model of another FFN width, that one follows ("published_ssd",
    "published_memory"): the same links, and FFN times scaled by the bytes.
    """
    found, missing = _outlook(facts.config, facts, values, 1.0)
    if published := facts.published:
        scale = published.nbytes("ffn") / facts.nbytes("ffn")
        more, reason = _outlook(published.config, facts, values, scale)
        found |= {f"published_{situation}": rows for situation, rows in more.items()}
        missing = missing or reason
    return found, missing


def _outlook(
    config: ModelConfig, facts: Facts, values: Values, ffn_scale: float
) -> tuple[dict[str, list[dict[str, Any]]], str]:
    found = {}
    for situation, budgets in (("ssd", False), ("memory", True)):
        machine = machine_of(facts, values, budgets=budgets)
        compute_s = {
            phase: {kind: s * (ffn_scale if kind == "ffn" else 1.0) for kind, s in times.items()}
            for phase, times in machine.compute_s.items()
        }
        try:
            found[situation] = _rows(changes(config, replace(machine, compute_s=compute_s)))
        except BudgetError as error:
            return found, str(error)
    return found, ""


def _rows(found: Sequence[Forecast]) -> list[dict[str, Any]]:
    """The first is what the others are changes of."""
    base = found[0]
    return [
        {
            "name": item.name,
            "tiers": {tier: item.plan.count(tier) for tier in TIERS},
            "off_device_bytes": item.off_device_bytes,
            "seconds": {phase: run.seconds for phase, run in item.passes.items()},
            "binding": {phase: run.binding for phase, run in item.passes.items()},
            "gain": {phase: base.passes[phase].seconds / run.seconds for phase, run in item.passes.items()},
        }
        for item in found
    ]


def by_kind(config: ModelConfig, kind: Kind) -> int:
    """Elements of a sublayer's matrices and norm."""
    total = 0
    for shape in config.sublayer_shapes(kind).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total

"""What ``mhaffn plan`` plans for, and what it prints: placement, predicted passes, and what each change would bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer, order, parse_bytes
from mhaffn.errors import ConfigError, StoreError
from mhaffn.files import read_json_object, shown
from mhaffn.forecast import PHASES, Forecast, Machine, Stored, changes
from mhaffn.formats import Formats
from mhaffn.measured import Layer, Measured, steps
from mhaffn.plan import TIERS
from mhaffn.profile import Profile, Widths
from mhaffn.shapes import SHAPES, folder_of
from mhaffn.simulate import Links
from mhaffn.sizes import Sizes, Workload
from mhaffn.store import Store, manifest
from mhaffn.trace import Phase


@dataclass(frozen=True)
class Hardware:
    """A machine given by hand: bytes of memory, bytes a second of SSD, link and GPU memory, operations a second.

    What is None was not given.
    """

    gpu: int | None = None
    dram: int | None = None
    ssd: float | None = None
    h2d: float | None = None
    hbm: float | None = None
    flops: float | None = None

    @staticmethod
    def parse(
        *, gpu: str | None, dram: str | None, ssd: str | None, h2d: str | None, hbm: str | None, tflops: float | None
    ) -> Hardware:
        """Of sizes and speeds as people write them, ``16GiB`` and ``5GB``; raises :class:`ConfigError`."""
        written = (("ssd", ssd), ("h2d", h2d), ("hbm", hbm))
        speeds = {name: float(_speed(name, text)) for name, text in written if text is not None}
        for name, speed in speeds.items():
            if speed < SPEED_MIN:
                raise ConfigError(
                    f"got --{name} of {speed:.0f} bytes a second, expected a speed with its unit, as in 5GB"
                )
        return Hardware(
            gpu=None if gpu is None else parse_bytes(gpu),
            dram=None if dram is None else parse_bytes(dram),
            flops=None if tflops is None else tflops * 1e12,
            **speeds,
        )


def _speed(name: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError:
        raise ConfigError(
            f"got --{name} {shown(text)}, expected a speed in bytes a second with its unit, as in 5GB"
        ) from None


OPTIONS = {"flops": "tflops"}
TYPICAL = Hardware(gpu=16 << 30, dram=32 << 30, ssd=5e9, h2d=25e9, hbm=900e9, flops=100e12)
SPEED_MIN = 1e6
"""Bytes a second: what is slower was written without its unit."""
PROMPT_TOKENS, CONTEXT = 2048, 4096
"""What is planned for unless told, where the model knows so many positions."""


def model_of(name: str) -> tuple[ModelConfig, Stored | None]:
    """The widths of a shape by name or a model, and, of a packed store or a model in float32, the bytes that it holds.

    Raises as :func:`~mhaffn.shapes.shape_of` does, and what :meth:`Store.open` raises.
    """
    if name in SHAPES:
        return SHAPES[name], None
    folder = folder_of(name)
    config = ModelConfig.from_folder(folder)
    if (folder / manifest.NAME).exists():
        return config, Store.open(folder).stored()
    values = read_json_object(folder / "config.json", StoreError, "Fetch the model again.")
    if values.get("dtype", values.get("torch_dtype")) == "float32":  # it is streamed as it is
        sizes = Sizes(config, "float32")
        return config, {s: sizes.tensors(s) for s in order(config.num_layers)}
    return config, None


def workload_of(config: ModelConfig, prompt_tokens: int | None, context: int | None) -> Workload:
    """What to plan for; the context holds the prompt. Raises :class:`ConfigError` for more than the model knows."""
    known = config.max_position_embeddings
    tokens = prompt_tokens or min(PROMPT_TOKENS, known)
    work = Workload(tokens=tokens, context=max(context or min(CONTEXT, known), tokens))
    if work.context > known:
        raise ConfigError(
            f"got a context of {work.context}, expected at most {known}, the positions this model "
            "knows: change --context or --prompt-tokens"
        )
    return work


def machine_for(config: ModelConfig, given: Hardware, profile: Profile | None, work: Workload) -> tuple[Machine, str]:
    """The machine to plan for, and whose figures it has: those given, else those measured, else typical ones.

    Compute is measured or given as a whole. A profile without GPU tells of its SSD alone where a GPU is given.
    """
    names = [field.name for field in fields(Hardware) if getattr(given, field.name) is not None]
    by_hand = f"; given: {', '.join(f'--{OPTIONS.get(name, name)}' for name in names)}" if names else ""
    if profile is None:
        return machine_by_hand(config, _or(given, TYPICAL), work), f"a typical machine{by_hand}"
    if profile.h2d is None and set(names) - {"dram", "ssd"}:
        partly = replace(TYPICAL, ssd=profile.ssd, dram=profile.dram_bytes)
        return machine_by_hand(config, _or(given, partly), work), f"SSD and DRAM of {profile.describe()}{by_hand}"
    machine = profile.machine(config, given.gpu, given.dram, work)
    links = Links(given.ssd or machine.links.ssd, given.h2d or machine.links.h2d)
    if given.hbm or given.flops:
        machine = replace(machine, compute_s=machine_by_hand(config, _or(given, TYPICAL), work).compute_s)
    return replace(machine, links=links), f"{profile.describe()}{by_hand}"


def _or(given: Hardware, otherwise: Hardware) -> Hardware:
    return Hardware(*(
        getattr(otherwise if getattr(given, field.name) is None else given, field.name) for field in fields(Hardware)
    ))  # fmt: skip


def machine_by_hand(config: ModelConfig, hardware: Hardware, work: Workload) -> Machine:
    """Compute by the roofline: what is read over the memory's speed, or what is multiplied over the processor's."""
    assert hardware.ssd and hardware.hbm and hardware.flops  # complete, unlike what was given
    widths = Widths.of(config)
    read_s = {kind: widths.read_bytes(kind, work.tokens) / hardware.hbm for kind in KINDS}
    compute: dict[Phase, Mapping[Kind, float]] = {
        "prefill": {kind: max(widths.operations(kind, work.tokens) / hardware.flops, read_s[kind]) for kind in KINDS},
        "decode": read_s,
    }
    return Machine(Links(hardware.ssd, hardware.h2d), compute, hardware.gpu or None, hardware.dram or None, work)


def plan_for(
    config: ModelConfig, machine: Machine, source: str, formats: Formats | None = None, stored: Stored | None = None
) -> tuple[list[Forecast], RenderableType]:
    """The machine as it is and each change alone, with the table for people; ``source`` says whose figures.

    ``formats`` are those to compare beside the usual ones; ``stored`` is what a packed store holds.
    """
    found = changes(config, machine, formats, stored)
    base = found[0]
    speeds = f"SSD {machine.links.ssd / 1e9:.1f} GB/s"
    if machine.links.h2d is not None:
        speeds += f", host to GPU {machine.links.h2d / 1e9:.1f} GB/s"
    lines: list[RenderableType] = [
        Text(f"{source}: {speeds}"),
        Text(base.plan.describe()),
        _forecast_table(found, "one pass, predicted"),
    ]
    for phase in PHASES:
        now = base.passes[phase]
        best = min(found[1:], key=lambda other: other.passes[phase].seconds)
        gain = now.seconds / best.passes[phase].seconds
        advice = f"{best.name} helps most, {gain:.2f}×" if gain > 1.02 else "none of these changes helps much"
        lines.append(Text(f"{phase}: bound by {now.binding}; {advice}"))
    if base.passes["decode"].binding != "compute":
        lines.append(Text("decode: one token guessed right in each pass is 2× faster too (mhaffn run --lookup 10)"))
    return found, Group(*lines)


def _forecast_table(found: Sequence[Forecast], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("", "GPU/DRAM/SSD"):
        table.add_column(column, no_wrap=True)
    table.add_column("off GPU", justify="right", no_wrap=True)
    for phase in PHASES:
        table.add_column(f"{phase} s", justify="right", no_wrap=True)
        table.add_column("by", no_wrap=True)
    for item in found:
        tiers = "/".join(str(item.plan.count(tier)) for tier in TIERS)
        cells = [
            item.name,
            tiers,
            f"{item.off_device_bytes / 2**30:.1f} GiB",
        ]
        for phase in PHASES:
            cells += [_seconds(item.passes[phase].seconds), item.passes[phase].binding]
        table.add_row(*cells)
    return table


def _seconds(seconds: float) -> str:
    """With two decimals, or for less than a second three digits that count."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:#.3g}"


def analysis(measured: Measured, layers: Mapping[Phase, Layer], outlook: Sequence[Forecast]) -> RenderableType:
    """The derived figures of measured sublayers, the cross-layer bound, and the outlook for the whole model."""
    parts: list[RenderableType] = [Text(measured.name, style="bold"), _weights_table(measured), _steps_table(measured)]
    for phase, layer in layers.items():
        table = Table(title=f"{phase}, one layer, ms", title_justify="left")
        for column in ("", "compute", "share", "I/O", "bound", "wait", "prefetch layers"):
            table.add_column(column, justify="right")
        for kind in KINDS:
            table.add_row(
                kind.upper(), f"{layer.compute_ms[kind]:.2f}", f"{layer.compute_share(kind):.1%}",
                f"{layer.io_ms[kind]:.2f}", f"{layer.sublayer_bound_ms(kind):.2f}", f"{layer.wait_ms(kind):.2f}",
                str(layer.prefetch_layers(kind)),
            )  # fmt: skip
        parts += [
            table,
            Text(
                f"  serial {layer.serial_ms:.2f}; sum of maxima {layer.ideal_ms:.2f} ({layer.ideal_speedup:.2f}×); "
                f"bound {layer.bound_ms:.2f} ({layer.bound_speedup:.2f}×)\n"
            ),
        ]
    parts.append(
        _forecast_table(outlook, f"{measured.config.num_layers} layers, one pass, each step on top of the last")
    )
    if measured.published_intermediate_size:
        parts.append(
            Text(
                f"measured with F {measured.config.intermediate_size}; the published model has "
                f"{measured.published_intermediate_size}: both are shown"
            )
        )
    return Group(*parts)


def _weights_table(measured: Measured) -> Table:
    """Bytes of a layer, and how fast they were moved."""
    table = Table(title="weights, one layer", title_justify="left")
    for column in ("", "GiB", "share", "host to GPU ms", "GiB/s", "SSD ms", "GiB/s"):
        table.add_column(column, justify="right")
    sizes = Sizes(measured.config, "bfloat16")
    gib = {kind: sizes.weights(Sublayer(0, kind)) / 2**30 for kind in KINDS}
    total = sum(gib.values())
    rows = [(kind.upper(), gib[kind], measured.h2d_ms[kind], measured.ssd_ms[kind]) for kind in KINDS]
    rows.append(("both", total, sum(measured.h2d_ms.values()), sum(measured.ssd_ms.values())))
    for name, size, h2d_ms, ssd_ms in rows:
        table.add_row(
            name, f"{size:.3f}", f"{size / total:.0%}",
            f"{h2d_ms:.2f}", f"{size / h2d_ms * 1e3:.2f}", f"{ssd_ms:.2f}", f"{size / ssd_ms * 1e3:.2f}",
        )  # fmt: skip
    return table


def _steps_table(measured: Measured) -> Table:
    """One step after the other, with shares of that time, and how much shorter decode's are."""
    table = Table(title="one step after the other, one layer", title_justify="left")
    for column in ("", "prefill ms", "share", "decode ms", "share", "prefill / decode"):
        table.add_column(column, justify="right")
    prefill, decode = (steps(measured, phase) for phase in PHASES)
    total, last = (sum(measured.compute_ms[phase].values()) for phase in PHASES)
    for name in prefill:
        ratio = f"{prefill[name] / decode[name]:.1f}×" if name.endswith("compute") else ""
        table.add_row(
            name, f"{prefill[name]:.2f}", f"{prefill[name] / sum(prefill.values()):.1%}",
            f"{decode[name]:.2f}", f"{decode[name] / sum(decode.values()):.1%}", ratio,
        )  # fmt: skip
    table.add_row("compute", f"{total:.2f}", "", f"{last:.2f}", "", f"{total / last:.1f}×")
    return table


def analysis_to_dict(
    measured: Measured, layers: Mapping[Phase, Layer], outlook: Sequence[Forecast]
) -> dict[str, object]:
    """What :func:`analysis` shows, for JSON; times in milliseconds but in ``outlook``, as :func:`to_dict` has them."""
    return {
        "name": measured.name,
        "layers": {
            phase: {
                "serial_ms": layer.serial_ms, "ideal_ms": layer.ideal_ms, "bound_ms": layer.bound_ms,
                "ideal_speedup": layer.ideal_speedup, "bound_speedup": layer.bound_speedup,
                "steps_ms": steps(measured, phase),
                "sublayers": {
                    kind: {
                        "compute_ms": layer.compute_ms[kind], "compute_share": layer.compute_share(kind),
                        "io_ms": layer.io_ms[kind], "bound_ms": layer.sublayer_bound_ms(kind),
                        "wait_ms": layer.wait_ms(kind), "prefetch_layers": layer.prefetch_layers(kind),
                    }
                    for kind in KINDS
                },
            }
            for phase, layer in layers.items()
        },
        "outlook": to_dict(outlook),
    }  # fmt: skip


def plan_to_dict(machine: Machine, source: str, found: Sequence[Forecast]) -> dict[str, object]:
    """What :func:`plan_for` shows, for JSON: the machine that is planned for, whose figures it has, and forecasts."""
    return {
        "machine": {
            "figures": source, "ssd_bytes_per_s": machine.links.ssd, "h2d_bytes_per_s": machine.links.h2d,
            "compute_s": {phase: dict(times) for phase, times in machine.compute_s.items()},
            "gpu_bytes": machine.gpu, "dram_bytes": machine.dram,
            "prompt_tokens": machine.work.tokens, "context": machine.work.context,
        },
        "forecasts": to_dict(found),
    }  # fmt: skip


def to_dict(found: Sequence[Forecast]) -> list[dict[str, object]]:
    """The forecasts for JSON: tiers, bytes and seconds."""
    return [
        {
            "name": item.name,
            "tiers": {sublayer.key: tier for sublayer, tier in item.plan.tiers.items()},
            "gpu_bytes": item.plan.gpu_bytes,
            "dram_bytes": item.plan.dram_bytes,
            "off_device_bytes": item.off_device_bytes,
            "prefetch": item.plan.prefetch,
            "passes": {
                phase: {
                    "seconds": run.seconds, "bound_s": run.bound_s, "binding": run.binding,
                    "ssd_s": run.ssd_s, "h2d_s": run.h2d_s, "compute_s": run.compute_s,
                }
                for phase, run in item.passes.items()
            },
        }
        for item in found
    ]  # fmt: skip

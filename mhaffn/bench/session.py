"""One run of ``mhaffn bench``: say what it needs, write random weights, measure in rounds, clear up, tell."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mhaffn import roofs
from mhaffn.bench import derive, memory, workplace
from mhaffn.bench.compute import compute_measurements
from mhaffn.bench.links import Links, open_links
from mhaffn.bench.passes import Executed
from mhaffn.bench.rounds import Measurement, Schedule, repeat, schedule, take, warm_up
from mhaffn.budget import free_dram, free_gpu, resolve_budget
from mhaffn.config import KINDS, ModelConfig, format_bytes
from mhaffn.device import choose_device, memory_errors
from mhaffn.errors import ConfigError, StoreError
from mhaffn.forecast import PHASES
from mhaffn.machine import describe
from mhaffn.random_model import write_random_model
from mhaffn.samples import Rounds, figure, values
from mhaffn.shapes import shape_of
from mhaffn.store import Store

FORMAT = 1
VOCABULARY = 256
ROUNDS, LEAST_ROUNDS = 12, 4
LAYERS, LEAST_LAYERS = 4, 2
TOKENS, QUICK_TOKENS = 2048, 512
SECONDS, QUICK_SECONDS = 90.0, 15.0
ROOF_FILE_BYTES = 256 << 20
LEAST_TOKENS = 64
NOISY = 0.10
BUSY = 0.05
Advance = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """What is asked for; None: decided by the machine."""

    shape: str = "llama3-70b"
    quick: bool = False
    seconds: float | None = None
    tokens: int | None = None
    layers: int | None = None
    gpu: str = "auto"
    dram: str = "auto"
    device: str | None = None
    folder: Path = field(default_factory=Path)

    @property
    def measuring_s(self) -> float:
        return self.seconds or (QUICK_SECONDS if self.quick else SECONDS)


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Measures and derives; returns what report.json holds.

    Raises :class:`ConfigError`, :class:`BudgetError` and :class:`StoreError` before anything is written, and what
    reading and computing raise.
    """
    device = choose_device(settings.device)
    if not math.isfinite(settings.measuring_s):
        raise ConfigError(f"got --seconds {settings.measuring_s}, expected how long to measure")
    config = shape_of(settings.shape)
    watch = memory.Watch(device)
    gpu = resolve_budget(settings.gpu, lambda: free_gpu(device)) if device.type == "cuda" else None
    dram = resolve_budget(settings.dram, free_dram)
    if device.type == "cpu" and settings.gpu not in ("auto", "0"):
        raise ConfigError(f"got --gpu {settings.gpu}, but the device is the CPU; give --dram alone")
    if dram is None or (device.type == "cuda" and gpu is None):
        raise ConfigError("got a budget of 0, expected room for two layers at least; leave --gpu and --dram at auto")
    with ExitStack() as stack, torch.inference_mode(), memory_errors():
        bench = _Bench(settings, config, device, gpu, dram, console, watch)
        folder = bench.prepare(stack)
        return bench.measure(stack, folder)


@dataclass
class _Bench:
    settings: Settings
    config: ModelConfig
    device: torch.device
    gpu: int | None
    dram: int
    console: Console
    watch: memory.Watch
    left_out: list[dict[str, str]] = field(default_factory=list)
    waited: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def leave_out(self, what: str, why: str = "") -> None:
        self.left_out.append({"what": what, "why": why})

    def prepare(self, stack: ExitStack) -> Path:
        """Decides how much, checks that there is room for it, and writes the weights."""
        self.roofs = memory.Roofs.fitting(self.device, self.dram, self.settings.quick)
        layers = self.settings.layers or (LEAST_LAYERS if self.settings.quick else LAYERS)
        self.streamed = replace(
            self.config, num_layers=max(LEAST_LAYERS, min(layers, self.config.num_layers)),
            vocab_size=min(self.config.vocab_size, VOCABULARY),
        )  # fmt: skip
        asked = self.settings.tokens or (QUICK_TOKENS if self.settings.quick else TOKENS)
        wanted = min(asked, self.config.max_position_embeddings)
        self.tokens = self._affordable(wanted)
        facts = self._facts()
        self.needs = memory.choose(
            memory.needs(self.streamed, self.tokens, self.device, self.roofs), self.gpu, self.dram
        )
        written = facts.nbytes("layer") * self.streamed.num_layers
        self.roof_file_bytes = ROOF_FILE_BYTES if written < ROOF_FILE_BYTES else 0
        disk = written + self.roof_file_bytes + (64 << 20)
        free = workplace.check_room(self.settings.folder, disk)
        for path in workplace.left_behind(self.settings.folder):
            self.say(f"{path} was left behind by a run that was killed, or belongs to one that goes on now")
        memory_line = f"; GPU {format_bytes(self.needs.gpu)}" if self.needs.gpu else ""
        self.say(
            f"{self.settings.shape} on {self.device.type}: {self.streamed.num_layers} of {self.config.num_layers} "
            f"layers streamed, prompt of {self.tokens} tokens, {self.settings.measuring_s:.0f} s of measuring or more\n"
            f"needs: disk {format_bytes(disk)} of {format_bytes(free)} free in {self.settings.folder.resolve()}, "
            f"removed at the end; host {format_bytes(self.needs.dram)}{memory_line}"
        )
        if self.settings.quick:
            self.leave_out("quick", f"{self.streamed.num_layers}, {self.tokens}, {self.settings.measuring_s:.0f} s")
        if self.needs.whole is None:
            self.leave_out("whole_layer_passes_memory")
        folder = stack.enter_context(workplace.scratch(self.settings.folder))
        try:
            self._write(folder, written)
        except OSError as error:
            raise StoreError(
                f"{self.settings.folder}: {error.strerror} while random weights were written; they are removed again. "
                f"Give a folder on another disk with --folder."
            ) from error
        return folder

    def _affordable(self, wanted: int) -> int:
        """Prompt positions whose prefill is measured often enough in the time there is."""
        sampler = roofs.matmul(self.device, torch.bfloat16, self.roofs.matmul)
        rate = max(roofs.measure(sampler, 0.2))
        tokens = wanted
        while tokens > LEAST_TOKENS:
            facts = replace(self._facts(), tokens=tokens)
            a_layer = facts.flops("prefill", "layer") / rate * 2.0  # below the roof, as a rule by less
            layers = 2 + 4 * self.streamed.num_layers  # compute alone, then two passes by each granularity
            if a_layer * layers * LEAST_ROUNDS <= self.settings.measuring_s:
                break
            tokens //= 2
        if tokens < wanted:
            self.leave_out("fewer_tokens", f"{tokens}/{wanted}")
        return tokens

    def _facts(self) -> derive.Facts:
        return derive.Facts(
            name=self.settings.shape, config=self.config, tokens=self.tokens,
            streamed_layers=self.streamed.num_layers, gpu=self.gpu, dram=self.dram,
            copies=self.device.type == "cuda",
        )  # fmt: skip

    def _write(self, folder: Path, nbytes: int) -> None:
        with _bar(self.console, nbytes + self.roof_file_bytes) as advance:
            write_random_model(
                folder, self.streamed, vocabulary=VOCABULARY, progress=lambda n: advance("writing random weights", n)
            )
            if self.roof_file_bytes:
                block = torch.randint(0, 255, (16 << 20,), dtype=torch.uint8).numpy().tobytes()
                with (folder / "roof.bin").open("wb", buffering=0) as file:
                    for _ in range(self.roof_file_bytes // len(block)):
                        file.write(block)
                        advance("writing random weights", len(block))
                    os.fsync(file.fileno())

    def measure(self, stack: ExitStack, folder: Path) -> dict[str, Any]:
        """Sets everything up, warms it up, and measures it by turns."""
        store = Store.open(folder)
        links = stack.enter_context(open_links(store, self.device))
        measurements = self._roofs(stack, folder) + self._links(links)
        measurements += self._compute_measurements(links)
        costs: list[tuple[Measurement, float]] = []
        with _bar(self.console, len(measurements) + 2 * len(PHASES)) as advance:
            self._warm_up(measurements, costs, advance)
            executed = self._executed(stack, store, costs, advance)
        plan = schedule(costs, self.settings.measuring_s, ROUNDS, LEAST_ROUNDS)
        self.say(f"measuring in {plan.rounds} rounds, about {plan.expected_s:.0f} s")
        if plan.rounds < ROUNDS:
            self.leave_out("fewer_rounds", f"{plan.rounds}/{ROUNDS}")
        measured = self._rounds(plan)
        medians, layers = values(measured), self.streamed.num_layers
        timelines = executed["split"].timelines({phase: layers * medians[f"pass.{phase}.split"] for phase in PHASES})
        self._note_noise(measured)
        return self._report(folder, links, measured, plan, timelines)

    def _roofs(self, stack: ExitStack, folder: Path) -> list[Measurement]:
        files = [folder / "roof.bin"] if self.roof_file_bytes else sorted(folder.glob("layer-*.safetensors"))
        disk = stack.enter_context(roofs.disk(files, self.roofs.disk, self.roofs.disk_memory))
        self.disk_direct = disk.direct
        samplers = {
            "memory": roofs.memory_read(self.device, self.roofs.memory),
            "matmul": roofs.matmul(self.device, torch.bfloat16, self.roofs.matmul),
            "ssd": disk.sample,
        }
        if self.device.type == "cuda":
            samplers["h2d"] = stack.enter_context(roofs.host_to_device(self.device, self.roofs.h2d))
        return [Measurement(f"roof.{name}", repeat(sampler)) for name, sampler in samplers.items()]

    def _links(self, links: Links) -> list[Measurement]:
        if self.device.type == "cuda":
            return links.ssd() + links.h2d()
        self.leave_out("h2d_no_gpu")
        return links.ssd()

    def _compute_measurements(self, links: Links) -> list[Measurement]:
        measurements, remarks = compute_measurements(self.config, links.weights(), self.tokens, self.device)
        for remark in remarks:
            what, _, why = remark.partition(":")
            self.leave_out(what, why)
        return measurements

    def _warm_up(
        self, measurements: list[Measurement], costs: list[tuple[Measurement, float]], advance: Advance
    ) -> None:
        """Adds each with the seconds that a sample takes."""
        for measurement in measurements:
            advance(f"warming up: {measurement.name}", 0)
            costs.append((measurement, warm_up(measurement)))
            advance("", 1)

    def _executed(
        self, stack: ExitStack, store: Store, costs: list[tuple[Measurement, float]], advance: Advance
    ) -> dict[str, Executed]:
        """Opens the streams whose passes fit the time, and adds what they measure."""
        found: dict[str, Executed] = {}
        for granularity, plan in (("split", self.needs.split), ("whole", self.needs.whole)):
            if plan is None:
                continue
            spent = sum(cost for _, cost in costs)
            if granularity == "whole" and spent * LEAST_ROUNDS > self.settings.measuring_s / 2:
                self.leave_out("whole_layer_passes_time")
                continue
            opened = Executed.open(store, plan, self.tokens, self.device, whole=granularity == "whole")
            stack.callback(opened.close)
            self._warm_up(opened.measurements(granularity), costs, advance)
            found[granularity] = opened
        return found

    def _rounds(self, plan: Schedule) -> dict[str, list[list[float]]]:
        measured: dict[str, list[list[float]]] = {step.measurement.name: [] for step in plan.steps}
        with _bar(self.console, plan.expected_s) as advance:
            for number in range(plan.rounds):
                for step in plan.steps:
                    advance(f"round {number + 1} of {plan.rounds}: {step.measurement.name}", 0)
                    samples, waited = take(step)
                    measured[step.measurement.name].append(samples)
                    self.waited.setdefault(step.measurement.name, []).append(waited)
                    advance("", step.expected_s)
        return measured

    def _note_noise(self, measured: Mapping[str, Rounds]) -> None:
        """Roofs are no code of ours: where they moved, the machine did."""
        moved = []
        for name, rounds in measured.items():
            medians = [statistics.median(samples) for samples in rounds]
            swing = figure(medians).relative
            if name.startswith("roof.") and swing > NOISY:
                moved.append(f"{name.removeprefix('roof.')} ±{swing:.0%}")
        if moved:
            self.leave_out("noisy", ", ".join(moved))
        waited = statistics.fmean(share for shares in self.waited.values() for share in shares)
        if waited > BUSY:
            self.leave_out("busy", f"{waited:.0%}")

    def _report(
        self, folder: Path, links: Links, measured: Mapping[str, Rounds], plan: Schedule, timelines: Any
    ) -> dict[str, Any]:
        facts, info = self._facts(), links.info()
        medians = values(measured)
        found, missing = derive.outlook(facts, medians)
        if missing:
            self.leave_out("outlook_budget", missing)
        if info.direct != "on":
            self.leave_out("page_cache", "; ".join(info.reasons))
        kinds = {kind: {"parameters": derive.by_kind(self.config, kind), "bytes": facts.nbytes(kind)} for kind in KINDS}
        derived = derive.derived_figures(facts, measured)
        if over := derive.faster_than_the_link(derived):
            self.leave_out("faster_than_link", f"{over:.0%}")
        settings = {
            "shape": self.settings.shape, "quick": self.settings.quick, "seconds": self.settings.measuring_s,
            "tokens": self.tokens, "streamed_layers": facts.streamed_layers, "rounds": plan.rounds,
            "gpu_bytes": self.gpu, "dram_bytes": self.dram, "device": self.device.type,
        }  # fmt: skip
        rings = {
            name: {"prefetch": plan.prefetch, "staging_bytes": plan.staging_bytes, "slot_bytes": plan.slot_bytes}
            for name, plan in (("split", self.needs.split), ("whole", self.needs.whole))
            if plan is not None
        }
        return {
            "format": FORMAT,
            "machine": describe() | {"disk": workplace.describe_disk(folder)},
            "reader": {"engine": info.engine, "direct": info.direct, "reasons": list(info.reasons)},
            "settings": settings,
            "config": asdict(self.config),
            "weights": kinds,
            "memory": {"peak": self.watch.peaks(), "needed": {"gpu": self.needs.gpu, "dram": self.needs.dram}},
            "rings": rings,
            "left_out": self.left_out,
            "measured": {name: [list(samples) for samples in rounds] for name, rounds in measured.items()},
            "waited": self.waited,
            "derived": derived,
            "predicted_ms": derive.predicted_ms(facts, medians, self.needs.split),
            "outlook": found,
            "timelines": timelines,
        }


@contextmanager
def _bar(console: Console, total: float) -> Iterator[Advance]:
    """A bar with the time left; ``advance(what, amount)``, an empty text leaves the last one."""
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.fields[left]} {task.description}"))
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, left="")
        done = 0.0

        def advance(what: str, amount: float) -> None:
            nonlocal done
            done += amount
            spent = time.perf_counter() - started
            left = f"{spent / done * max(total - done, 0):.0f} s left," if done else ""
            bar.update(task, completed=done, left=left, description=what or None)

        yield advance

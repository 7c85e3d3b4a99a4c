"""The executed pipeline: passes over a random model with all weights on SSD, split by sublayer and by whole layers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import xxhash

from mhaffn.bench.compute import tokens_of
from mhaffn.bench.rounds import Measurement
from mhaffn.config import KINDS, Kind, ModelConfig, Sublayer, order
from mhaffn.forecast import PHASES
from mhaffn.inputs import FilledCache, context_of, hidden_states
from mhaffn.modules import FFN, MHA, Block, Context, Provider
from mhaffn.plan import Plan, Tier, make_plan
from mhaffn.runner import Runner
from mhaffn.sizes import Sizes, Workload
from mhaffn.store import Record, Store, SublayerRecords
from mhaffn.store.safetensors import TensorInfo
from mhaffn.trace import Phase

HASH_BYTES = 16 << 20
QUIET_S = {"small": 0.005, "large": 0.03}
"""No read has ended for so long: none is under way. By sublayers of up to 16 MiB, and larger ones."""
SMALL_BYTES = 16 << 20
STEADY = 0.97
"""Of the bytes of its passes a sample must have read so much itself: else it lived on what was there before."""
MOST_TRIES = 6


def split_plan(config: ModelConfig, tokens: int, copies: bool, prefetch: int) -> Plan:
    """Every sublayer on SSD."""
    tiers: dict[Sublayer, Tier] = dict.fromkeys(order(config.num_layers), "ssd")
    work = Workload(tokens=tokens, context=tokens)
    return make_plan(config, "bfloat16", copies=copies, work=work, tiers=tiers, prefetch=prefetch)


def whole_store(store: Store) -> Store:
    """The store with each layer's records as one sublayer: names of the two norms are kept apart by kind."""
    layers = {}
    checksum: str | None = None
    for layer in range(store.config.num_layers):
        records: list[Record] = []
        for kind in KINDS:
            own = store.sublayers[Sublayer(layer, kind)].records
            records += [replace(record, name=f"{kind}_{record.name}") for record in own]
        whole = SublayerRecords(Sublayer(layer, "mha"), tuple(records), checksum)
        if checksum is None:
            checksum = _checksum(whole.tensors)  # a random model's layers hold the same values
        layers[whole.sublayer] = replace(whole, checksum=checksum)
    return replace(store, sublayers=layers)


def _checksum(tensors: Sequence[TensorInfo]) -> str:
    """XXH3-64 of the tensors' bytes."""
    digest = xxhash.xxh3_64()
    for tensor in tensors:
        with Path(tensor.path).open("rb") as file:
            for start in range(0, tensor.nbytes, HASH_BYTES):
                file.seek(tensor.offset + start)
                digest.update(file.read(min(HASH_BYTES, tensor.nbytes - start)))
    return digest.hexdigest()


def whole_plan(config: ModelConfig, split: Plan) -> Plan:
    """A layer in use and one on its way: the least that lets a transfer go on during compute."""
    sizes = Sizes(config, "bfloat16")
    room = 2 * sum(sizes.image(Sublayer(0, kind)) for kind in KINDS)
    tiers: dict[Sublayer, Tier] = {Sublayer(i, "mha"): "ssd" for i in range(config.num_layers)}
    return replace(split, tiers=tiers, prefetch=1, staging_bytes=room, slot_bytes=room if split.copies else 0)


@dataclass
class Executed:
    """An open runner and what its passes work on."""

    runner: Runner
    tokens: int
    cache: FilledCache
    inputs: Mapping[Phase, tuple[torch.Tensor, Context]]

    @staticmethod
    def open(store: Store, plan: Plan, tokens: int, device: torch.device, *, whole: bool = False) -> Executed:
        """Raises what :class:`~mhaffn.runner.Runner` raises."""
        runner = Runner(whole_store(store) if whole else store, plan, device=device)
        if whole:
            for layer, block in enumerate(runner.blocks):
                runner.blocks[layer] = _Whole(store.config, layer, block.mha.weights)
        cache = FilledCache(store.config, store.config.num_layers, tokens, device)
        inputs = {
            phase: (
                hidden_states(store.config, tokens_of(phase, tokens), device),
                context_of(store.config, tokens_of(phase, tokens), cache),
            )
            for phase in PHASES
        }
        return Executed(runner, tokens, cache, inputs)

    def measurements(self, granularity: str) -> list[Measurement]:
        """Milliseconds a layer of steady passes, by phase; one sample is several passes in a row.

        Where other work always lets the stream get ahead, a sample is the last of :data:`MOST_TRIES`, and reads less.
        """
        return [
            Measurement(f"pass.{phase}.{granularity}", lambda n, phase=phase: [self._layer_ms(phase, n)], shares=2.5)  # type: ignore[misc]
            for phase in PHASES
        ]

    def _layer_ms(self, phase: Phase, passes: int) -> float:
        x, context = self.inputs[phase]
        self.runner.forward(x, context)
        self._settle()
        for _ in range(MOST_TRIES):  # until what was prefetched while other things were measured is used up
            read, started = self.runner.reader_info().bytes_read, time.perf_counter()
            for _ in range(passes):
                self.runner.forward(x, context)
            self._settle()
            taken = time.perf_counter() - started
            read = self.runner.reader_info().bytes_read - read
            if read >= STEADY * passes * self.pass_bytes:
                break
        self._wait_for_prefetch()
        return taken * 1e3 / passes / self.runner.config.num_layers

    @property
    def pass_bytes(self) -> int:
        """Bytes that a pass reads."""
        return sum(self.runner.store.sublayers[s].nbytes for s in self.runner.plan.streamed("ssd"))

    def _settle(self) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)

    def _wait_for_prefetch(self) -> None:
        """Until the stream has filled its memory for the next pass: then it disturbs no other measurement."""
        largest = max(records.nbytes for records in self.runner.store.sublayers.values())
        quiet_s = QUIET_S["small" if largest <= SMALL_BYTES else "large"]
        before = -1
        while before != (before := self.runner.reader_info().bytes_read):
            time.sleep(quiet_s)
        self._settle()

    def timelines(self, pass_ms: Mapping[Phase, float]) -> dict[Phase, dict[str, Any]]:
        """What each link did in the pass of each phase that took most nearly ``pass_ms``: a picture of what is
        reported, not of whichever came last. Milliseconds from the end of the pass before."""
        if self.runner.copies:
            self.runner.sweep()  # spans on a GPU are reported once the device is past them
        return {phase: found for phase in PHASES if (found := self._timeline(phase, pass_ms[phase])) is not None}

    def _timeline(self, phase: Phase, pass_ms: float) -> dict[str, Any] | None:
        windows = self._windows(phase)
        if not windows:
            return None
        start_s, end_s = min(windows, key=lambda window: abs((window[1] - window[0]) * 1e3 - pass_ms))
        return {
            "window_ms": (end_s - start_s) * 1e3,
            "spans": [
                [
                    s.lane, s.sublayer.key, (max(s.start_s, start_s) - start_s) * 1e3,
                    (min(s.end_s, end_s) - start_s) * 1e3,
                ]
                for s in list(self.runner.trace.spans)
                if s.end_s > start_s and s.start_s < end_s
            ],
        }  # fmt: skip

    def _windows(self, phase: Phase) -> list[tuple[float, float]]:
        """Start and end of each pass of ``phase`` that came right behind another: from the end of compute to the end
        of compute. The first after a pause is left out, since it began with what had been read meanwhile."""
        passes, spans = self.runner.trace.kept(phase)
        ends: dict[int, float] = {}
        for span in spans:
            if span.lane in KINDS:
                ends[span.number] = max(span.end_s, ends.get(span.number, 0.0))
        numbers = [run.number for run in passes if run.number in ends and run.number - 1 in ends]
        return [(ends[number - 1], ends[number]) for number in numbers]

    def close(self) -> None:
        self.runner.close()


class _Whole(Block):
    """A decoder layer whose weights arrive as one."""

    def __init__(self, config: ModelConfig, layer: int, weights: Provider) -> None:
        self._parts: dict[Kind, SimpleNamespace] = {}
        mha = MHA(config, layer, lambda: nullcontext(self._parts["mha"]))
        ffn = FFN(config, lambda: nullcontext(self._parts["ffn"]))
        super().__init__(mha, ffn)
        self._weights = weights

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        with self._weights() as w:
            for kind in KINDS:
                own = {name.partition("_")[2]: value for name, value in vars(w).items() if name.startswith(kind)}
                self._parts[kind] = SimpleNamespace(**own)
            result = super().forward(x, context)
            self._parts.clear()
        return result

"""Seconds a pass of the stream, tier mix by tier mix, beside each link measured alone in the same run.

    python bench/stream_passes.py --folder /mnt/fast/model --layers 8 20 --json out.json
    python bench/stream_passes.py --folder /mnt/fast/model --whole --gpu 16GiB --dram 88GiB --json whole.json

Writes a random model of eight real-width layers into the folder (and removes it), so the folder's disk is the SSD
that is measured; more layers are those eight again. The bound of a mix is the greatest of: bytes read over the SSD's
speed, bytes copied over the link's speed, compute with everything resident. Because a shared machine drifts, links are
measured alone by turns with the passes, and each turn is held against the links just before and after it; ratios are
medians over turns. ``--whole`` runs the published number of layers within budgets, placed by the plan, and compares
with the plan's prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mhaffn.config import KINDS, Kind, Sublayer, order, parse_bytes
from mhaffn.device import choose_device
from mhaffn.formats import Formats
from mhaffn.hf import StreamedLlama
from mhaffn.image import Image
from mhaffn.machine import describe
from mhaffn.plan import Plan, Tier, make_plan
from mhaffn.random_model import write_random_model
from mhaffn.reader import PinnedArena, Reader, Request
from mhaffn.runner import Runner
from mhaffn.shapes import SHAPES
from mhaffn.simulate import Links, Work, predict
from mhaffn.sizes import Workload
from mhaffn.store import Store

CHUNK = 16 << 20
DISTINCT = 8
TURNS = 3
TURNS_OF_A_DISK = 5
"""Disks drift more than links and processors do, so their turns are more, and the medians over them steadier."""
WINDOW_S = 3.0
H2D_S = 1.0
"""For so long the link is measured alone, each time."""
CUDA = torch.cuda.is_available()
Tiers = Mapping[Sublayer, Tier]


@dataclass(frozen=True)
class Compute:
    """Seconds of compute alone: a pass, and a sublayer of each kind."""

    pass_s: float
    of: Mapping[Kind, float]


@dataclass(frozen=True)
class Mix:
    """A placement, and the numbers of tokens that passes over it take; with ``plan``, as that has it."""

    name: str
    tiers: Tiers
    tokens: tuple[int, ...]
    plan: Plan | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-70b")
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048])
    parser.add_argument("--mixes", nargs="*", metavar="WORDS", help="only mixes whose names hold one of these words")
    parser.add_argument("--passes", type=int, default=3, help="in a row, between two synchronised points")
    parser.add_argument("--whole", action="store_true", help="all layers of the shape, placed within the budgets")
    parser.add_argument("--gpu", default="16GiB")
    parser.add_argument("--dram", default="88GiB")
    parser.add_argument("--mha", help="a format in few bits, as `mhaffn pack` takes it")
    parser.add_argument("--ffn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    formats = Formats.parse(options.mha, options.ffn)
    total = write_random_model(options.folder, options.shape, DISTINCT, formats=formats)
    print(f"{total / 2**30:.2f} GiB of layers written in {time.perf_counter() - started:.0f} s", flush=True)
    results: dict[str, Any] = {"machine": describe(), "shape": options.shape, "formats": formats.options(), "rows": []}

    def keep(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        print(line(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    try:
        store = Store.open(options.folder)
        if options.whole:
            keep(whole(store, SHAPES[options.shape].num_layers, options))
        for layers in [] if options.whole else options.layers:
            for row in measured(repeated(store, layers), options.prompts, options.passes, options.mixes):
                keep(row)
    finally:
        shutil.rmtree(options.folder)


def repeated(store: Store, layers: int) -> Store:
    """The store as one of ``layers`` layers: its own, again and again."""
    config = replace(store.config, num_layers=layers)
    sublayers = {
        s: replace(store.sublayers[Sublayer(s.layer % store.config.num_layers, s.kind)], sublayer=s)
        for s in order(layers)
    }
    return replace(store, config=config, sublayers=sublayers)


def measured(store: Store, prompts: list[int], passes: int, only: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each mix of tiers, of those whose names hold one of ``only``, and each number of tokens."""
    layers = store.config.num_layers
    resident: Tier = "gpu" if CUDA else "dram"
    compute: dict[int, Compute] = {}
    with load(store, dict.fromkeys(order(layers), resident), max([1, *prompts])) as model:
        for tokens in (1, *prompts):
            samples = [
                seconds_a_pass(partial(run, model, tokens), 1 if tokens > 4096 else passes) for _ in range(TURNS)
            ]
            compute[tokens] = Compute(min(samples), compute_seconds(model))
    for mix in mixes(layers, prompts):
        if only and not any(words in mix.name for words in only):
            continue
        yield from measure(store, mix, passes, compute)


def mixes(layers: int, prompts: list[int]) -> Iterator[Mix]:
    sublayers = list(order(layers))

    def every(n: int, one: Tier, rest: Tier) -> Tiers:
        return {s: one if s.layer % n == n - 1 else rest for s in sublayers}

    yield Mix("SSD only", dict.fromkeys(sublayers, "ssd"), (1,))
    yield Mix("half DRAM, half SSD", every(2, "ssd", "dram"), (1,))
    if CUDA:
        yield Mix("a third GPU, rest DRAM", every(3, "gpu", "dram"), (1,))
        yield Mix("DRAM only", dict.fromkeys(sublayers, "dram"), (1, *prompts))


def measure(store: Store, mix: Mix, passes: int, compute: Mapping[int, Compute]) -> Iterator[dict[str, Any]]:
    """Passes of one mix by turns with its links alone."""
    nbytes = {s: store.sublayers[s].nbytes for s in mix.tiers}
    read = sum(nbytes[s] for s, tier in mix.tiers.items() if tier == "ssd")
    copied = sum(nbytes[s] for s, tier in mix.tiers.items() if tier != "gpu") if CUDA else 0
    with load(store, mix.tiers, max(mix.tokens), mix.plan) as model:
        for tokens in mix.tokens:
            work = partial(run, model, tokens)
            work()
            # A window's ends are uncertain by a sublayer on its way: long windows make that small.
            count = max(1 if read or tokens > 4096 else passes, math.ceil(WINDOW_S / seconds_a_pass(work, 1)))
            peak = torch.cuda.max_memory_reserved() if CUDA else 0  # before links alone take memory of their own
            samples: list[float] = []
            ssd: list[float] = []
            h2d: list[float] = []
            turns = TURNS_OF_A_DISK if read else TURNS
            for turn in range(turns + 1):
                wait_for_prefetch(model)
                ssd += [ssd_speed(store)] if read else []
                h2d += [h2d_speed()] if copied else []
                if turn < turns:
                    samples.append(seconds_a_pass(work, count))
            plan, info = model.runner.plan, model.runner.reader_info()
            links = {
                "ssd": [read / speed for speed in between(ssd)] or [0.0],
                "h2d": [copied / speed for speed in between(h2d)] or [0.0],
                "compute": [compute[tokens].pass_s],
            }
            bounds = {link: statistics.median(times) for link, times in links.items()}
            link = max(bounds, key=lambda key: bounds[key])
            alone = links[link] * turns if len(links[link]) == 1 else links[link]
            ratios = [sample / bound for sample, bound in zip(samples, alone, strict=True)]
            speeds = Links(statistics.median(ssd) if read else 1e12, statistics.median(h2d) if copied else None)
            steps = {s: Work(nbytes[s], compute[tokens].of[s.kind]) for s in mix.tiers}
            seconds = statistics.median(samples)
            yield {
                "layers": store.config.num_layers, "mix": mix.name, "tokens": tokens, "seconds": seconds,
                "samples": samples, "bounds": bounds, "bound_link": link, "ratio": statistics.median(ratios),
                "ratios": ratios, "predicted": predict(plan, steps, speeds).seconds,
                "gib_per_s": sum(nbytes.values()) / seconds / 2**30, "ssd_alone": ssd, "h2d_alone": h2d,
                "ssd_busy": ssd_busy(model), "planned_gpu_bytes": plan.gpu_bytes, "peak_gpu_bytes": peak,
                "passes": count, "engine": info.engine, "direct": info.direct,
            }  # fmt: skip


def between(speeds: list[float]) -> list[float]:
    """The speed during each turn: the harmonic mean of those measured before and after it."""
    return [2 / (1 / before + 1 / after) for before, after in pairwise(speeds)]


def ssd_busy(model: StreamedLlama) -> float:
    """The share of the last pass's time in which some read was under way."""
    trace = model.runner.trace
    last = trace.passes[-1]
    spans = [s for s in list(trace.spans) if s.lane == "ssd"]
    busy = sum(max(0.0, min(s.end_s, last.end_s) - max(s.start_s, last.start_s)) for s in spans)
    return busy / (last.end_s - last.start_s)


def whole(store: Store, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """The whole model within budgets: predicted from links alone, then measured."""
    store = repeated(store, layers)
    gpu, dram = parse_bytes(options.gpu), parse_bytes(options.dram)
    plan = make_plan(store.config, store.dtype, gpu=gpu, dram=dram, copies=CUDA, work=work_of(1), stored=store.stored())
    print(plan.describe(), flush=True)
    sample = repeated(store, DISTINCT)
    with load(sample, dict.fromkeys(order(DISTINCT), "gpu" if CUDA else "dram"), 1) as model:
        seconds_a_pass(partial(run, model, 1), 3)
        kinds = compute_seconds(model)
    mix = Mix(f"GPU {options.gpu}, DRAM {options.dram}", plan.tiers, (1,), plan)
    (row,) = measure(store, mix, 1, {1: Compute(layers * sum(kinds.values()), kinds)})
    nbytes = sum(map(sum, store.stored().values()))
    return row | {
        "bytes": nbytes,
        "gpu_budget": gpu,
        "dram_budget": dram,
        "predicted_over_measured": row["predicted"] / row["seconds"],
    }


def line(row: Mapping[str, Any]) -> str:
    bounds = row["bounds"]
    return (
        f"{row['layers']:2} layers, {row['mix']:24} T={row['tokens']:5} {row['seconds']:8.4f} s/pass  "
        f"bound {bounds[row['bound_link']]:8.4f} ({row['bound_link']}) ratio {row['ratio']:.3f}  "
        f"predicted {row['predicted']:.4f}  "
        f"{row['gib_per_s']:6.2f} GiB/s  SSD busy {row['ssd_busy']:.0%}  GPU {row['peak_gpu_bytes'] / 2**30:.2f} of "
        f"{row['planned_gpu_bytes'] / 2**30:.2f} GiB planned"
    )


@contextmanager
def load(store: Store, tiers: Tiers, tokens: int, plan: Plan | None = None) -> Iterator[StreamedLlama]:
    """The store by ``plan``; else under these tiers, all budgets aside."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    plan = plan or make_plan(
        store.config, store.dtype, copies=CUDA, work=work_of(tokens), tiers=tiers, stored=store.stored()
    )
    runner = Runner(store, plan, device=choose_device(None))
    config = AutoConfig.from_pretrained(store.path)
    config.num_hidden_layers = store.config.num_layers
    with StreamedLlama(config, runner) as model:
        yield model


def work_of(tokens: int) -> Workload:
    return Workload(tokens=tokens, context=max(tokens, 8))


@torch.inference_mode()
def run(model: StreamedLlama, tokens: int) -> None:
    model(torch.randint(3, 900, (1, tokens), device=model.device), use_cache=False, logits_to_keep=1)


def seconds_a_pass(work: Callable[[], None], passes: int) -> float:
    """Seconds of a steady pass: several in a row between two synchronised points, one before them."""
    work()
    settle()
    started = time.perf_counter()
    for _ in range(passes):
        work()
    settle()
    return (time.perf_counter() - started) / passes


def compute_seconds(model: StreamedLlama) -> dict[Kind, float]:
    """Seconds of compute of a sublayer of each kind, in passes like the last one; everything resident."""
    trace = model.runner.trace
    last = trace.passes[-1]
    model.runner.sweep()  # on a GPU spans are reported once they have passed
    alike = {item.number for item in trace.passes if (item.tokens, item.phase) == (last.tokens, last.phase)}
    spans = [span for span in trace.spans if span.number in alike]
    return {kind: statistics.median(s.end_s - s.start_s for s in spans if s.lane == kind) for kind in KINDS}


def wait_for_prefetch(model: StreamedLlama) -> None:
    """Returns once the stream has filled its memory ahead of the next pass and reads no more."""
    before = -1
    while before != (before := model.runner.reader_info().bytes_read):
        time.sleep(0.3)
    settle()


def settle() -> None:
    if CUDA:
        torch.cuda.synchronize()


def ssd_speed(store: Store) -> float:
    """Bytes a second the reader alone takes all distinct sublayers in, into registered memory.

    Four places, so that the queue never runs dry; timed once each of them has been written to, as in a stream.
    """
    images = [Image(store.sublayers[s]) for s in order(min(DISTINCT, store.config.num_layers))]
    slot_bytes = -(-max(image.nbytes for image in images) // (2 << 20)) * (2 << 20) + (2 << 20)
    with PinnedArena(4 * slot_bytes) as arena, Reader(arena=arena) as reader:
        slots = [arena.lease(slot_bytes, i * slot_bytes) for i in range(4)]
        requests: list[Request] = []
        for number, image in enumerate(images):
            if number >= 4:
                requests[number - 4].wait()
            requests.append(reader.submit(image.extents, slots[number % 4]))
        for request in requests:
            request.wait()
        seconds = requests[-1].finished_s - requests[3].finished_s
        for slot in slots:
            slot.release()
    return sum(image.records.nbytes for image in images[4:]) / seconds


def h2d_speed() -> float:
    """Bytes a second of copies in chunks from registered memory, by events, over about a second.

    For so long, because a shared link has slow moments: passes are timed over seconds, and meet them too.
    """
    with PinnedArena(1 << 30) as arena, arena.lease(1 << 30) as slot:
        source = torch.frombuffer(slot, dtype=torch.uint8)
        target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

        def copy(times: int) -> float:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(times):
                for start in range(0, 1 << 30, CHUNK):
                    target[start : start + CHUNK].copy_(source[start : start + CHUNK], non_blocking=True)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / times

        once = max(copy(1), copy(1))
        return (1 << 30) / copy(math.ceil(H2D_S / once))


if __name__ == "__main__":
    main()

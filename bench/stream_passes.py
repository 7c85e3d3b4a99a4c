"""Seconds a pass of the stream, tier mix by tier mix, beside each link measured alone in the same run.

    python bench/stream_passes.py --folder /mnt/fast/model --shape llama3-70b --layers 8 --json out.json

Writes a random model into the folder (and removes it), so the folder's disk is the SSD that is measured.
The bound of a mix is the greatest of: bytes read over the SSD's speed, bytes copied over the link's speed,
compute with everything resident. Each link is measured alone before and after; the better speed counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_model import SHAPES, write_random_model

import mhaffn
from mhaffn.config import Sublayer, order
from mhaffn.image import Image
from mhaffn.machine import describe
from mhaffn.plan import Tier
from mhaffn.reader import PinnedArena, Reader, Request
from mhaffn.store import Store

CHUNK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-70b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    total = write_random_model(options.folder, options.shape, options.layers)
    print(f"{total / 2**30:.2f} GiB of layers written in {time.perf_counter() - started:.0f} s", flush=True)
    try:
        results = measure(options.folder, options.prompt, options.passes)
    finally:
        shutil.rmtree(options.folder)
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "layers": options.layers, **results}, indent=1))


def measure(folder: Path, prompt: int, passes: int) -> dict[str, object]:
    store = Store.open(folder)
    layers = store.config.num_layers
    cuda = torch.cuda.is_available()
    everything = sum(records.nbytes for records in store.sublayers.values())
    before = {"ssd": ssd_speed(store), "h2d": h2d_speed() if cuda else 0.0}
    resident: Tier = "gpu" if cuda else "dram"
    compute = {}
    with load(folder, dict.fromkeys(order(layers), resident)) as model:
        for tokens in (1, prompt):
            compute[tokens] = pass_seconds(model, tokens, passes)[0]
    runs = []
    for name, tiers, tokens in mixes(layers, prompt, cuda):
        with load(folder, tiers) as model:
            seconds, samples = pass_seconds(model, tokens, passes)
            peak = torch.cuda.max_memory_allocated() if cuda else 0
            info = model.runner.reader_info()
        runs.append((name, tiers, tokens, seconds, samples, peak, info))
    after = {"ssd": ssd_speed(store), "h2d": h2d_speed() if cuda else 0.0}
    for when, speeds in (("before", before), ("after", after)):
        print(when, {name: f"{speed / 2**30:.2f} GiB/s" for name, speed in speeds.items()}, flush=True)
    best = {name: max(before[name], after[name]) for name in before}
    rows = []
    for name, tiers, tokens, seconds, samples, peak, info in runs:
        read = sum(store.sublayers[s].nbytes for s, tier in tiers.items() if tier == "ssd")
        copied = sum(store.sublayers[s].nbytes for s, tier in tiers.items() if tier != "gpu") if cuda else 0
        bounds = {
            "ssd": read / best["ssd"],
            "h2d": copied / best["h2d"] if cuda else 0.0,
            "compute": compute[tokens],
        }
        link = max(bounds, key=lambda key: bounds[key])
        rows.append(
            {
                "mix": name, "tokens": tokens, "seconds": seconds, "samples": samples, "bounds": bounds,
                "bound_link": link, "ratio": seconds / bounds[link], "gib_per_s": everything / seconds / 2**30,
                "peak_gpu_bytes": peak, "engine": info.engine, "direct": info.direct,
            }
        )  # fmt: skip
        print(
            f"{name:24} T={tokens:5} {seconds:8.4f} s/pass  bound {bounds[link]:8.4f} ({link}) "
            f"ratio {seconds / bounds[link]:.3f}  {everything / seconds / 2**30:6.2f} GiB/s",
            flush=True,
        )
    return {"bytes": everything, "alone_before": before, "alone_after": after, "compute_s": compute, "rows": rows}


def mixes(layers: int, prompt: int, cuda: bool) -> list[tuple[str, dict[Sublayer, Tier], int]]:
    sublayers = list(order(layers))

    def every(n: int, one: Tier, rest: Tier) -> dict[Sublayer, Tier]:
        return {s: one if s.layer % n == n - 1 else rest for s in sublayers}

    ssd, dram = dict.fromkeys(sublayers, "ssd"), dict.fromkeys(sublayers, "dram")
    found: list[tuple[str, dict[Sublayer, Tier], int]] = [("SSD only", ssd, 1)]
    if cuda:
        found += [
            ("DRAM only", dram, 1),
            ("half DRAM, half SSD", every(2, "ssd", "dram"), 1),
            ("a third GPU, rest DRAM", every(3, "gpu", "dram"), 1),
            ("DRAM only", dram, prompt),
        ]
    else:
        found += [("half DRAM, half SSD", every(2, "ssd", "dram"), 1)]
    return [*found, ("SSD only", ssd, prompt)]


def load(folder: Path, tiers: dict[Sublayer, Tier]) -> mhaffn.StreamedLlama:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return mhaffn.load(folder, gpu=None, dram=None, tiers=tiers)


@torch.inference_mode()
def pass_seconds(model: mhaffn.StreamedLlama, tokens: int, passes: int) -> tuple[float, list[float]]:
    """Seconds of a steady pass: several in a row between two synchronised points, repeated."""
    ids = torch.randint(3, 900, (1, tokens), device=model.device)

    def run() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    run()
    samples = []
    for _ in range(3):
        settle()
        started = time.perf_counter()
        for _ in range(passes):
            run()
        settle()
        samples.append((time.perf_counter() - started) / passes)
    return statistics.median(samples), samples


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ssd_speed(store: Store) -> float:
    """Bytes a second the reader alone takes all sublayers in, into registered memory: the best of three passes.

    Four places, so that the queue never runs dry; the best, because a bound must not be beaten by luck.
    """
    images = [Image(records) for records in store.sublayers.values()]
    slot_bytes = -(-max(image.nbytes for image in images) // (2 << 20)) * (2 << 20) + (2 << 20)
    with PinnedArena(4 * slot_bytes) as arena, Reader(arena=arena) as reader:
        slots = [arena.lease(slot_bytes, i * slot_bytes) for i in range(4)]
        times = []
        for _ in range(3):
            requests: list[Request] = []
            started = time.perf_counter()
            for number, image in enumerate(images):
                if number >= 4:
                    requests[number - 4].wait()
                requests.append(reader.submit(image.extents, slots[number % 4]))
            for request in requests:
                request.wait()
            times.append(time.perf_counter() - started)
        for slot in slots:
            slot.release()
    return sum(image.records.nbytes for image in images) / min(times)


def h2d_speed() -> float:
    """Bytes a second of copies in chunks from registered memory, by events."""
    with PinnedArena(1 << 30) as arena, arena.lease(1 << 30) as slot:
        source = torch.frombuffer(slot, dtype=torch.uint8)
        target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

        def copy() -> None:
            for start in range(0, 1 << 30, CHUNK):
                target[start : start + CHUNK].copy_(source[start : start + CHUNK], non_blocking=True)

        speed = (1 << 30) / event_seconds(copy)
    return speed


def event_seconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()

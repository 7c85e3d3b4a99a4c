"""Other ways to run layers that are not on the GPU, beside mhaffn, on one checkpoint in one run.

    python bench/stream_peers.py --folder /mnt/fast/peers --json bench/results/peers-h100.json

Writes a random checkpoint of real widths, a plain safetensors folder, into the folder (and removes it; AirLLM needs as
much room again). Each contender runs in a process of its own with embedding, norm and head on the GPU and all layers
off it, and decodes one token a pass, then takes a prompt. The page cache is dropped before each pass from disk, where
that is allowed. Peers that are not installed are named with the command that gets them. The links' own speeds are
measured before and after.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stream_passes import h2d_speed, ssd_speed

from mhaffn.config import order
from mhaffn.machine import describe
from mhaffn.random_model import write_random_shards
from mhaffn.shapes import SHAPES
from mhaffn.store import Store

PASSES = 3
PHASE_S = 15.0
"""Seconds after which no further pass is timed, once one has been."""
Forward = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class Contender:
    """A way to run the model: where its layers lie, the module it needs, and how it is loaded."""

    name: str
    tier: str
    needs: str
    load: Callable[[Path], Forward]


def load_mhaffn(tier: Any) -> Callable[[Path], Forward]:
    def load(folder: Path) -> Forward:
        import mhaffn

        layers = Store.open(folder).config.num_layers
        model = mhaffn.load(folder, gpu=None, dram=None, tiers=dict.fromkeys(order(layers), tier))
        return lambda ids: model(ids, use_cache=False, logits_to_keep=1)

    return load


def load_accelerate(place: str) -> Callable[[Path], Forward]:
    def load(folder: Path) -> Forward:
        from transformers import AutoModelForCausalLM

        kept = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        places = dict.fromkeys(kept, 0) | {f"model.layers.{i}": place for i in range(layer_count(folder))}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=places, offload_folder=str(folder / "offload")
        )
        return lambda ids: model(ids, use_cache=False, logits_to_keep=1)

    return load


def load_diffusers(folder: Path) -> Forward:
    from diffusers.hooks import apply_group_offloading
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for module in (model.model.embed_tokens, model.model.norm, model.model.rotary_emb, model.lm_head):
        module.cuda()
    for layer in model.model.layers:
        apply_group_offloading(
            layer, onload_device=torch.device("cuda"), offload_device=torch.device("cpu"),
            offload_type="leaf_level", use_stream=True, record_stream=True,
        )  # fmt: skip
    return lambda ids: model(ids, use_cache=False, logits_to_keep=1)


def load_diffusers_whole(folder: Path) -> Forward:
    from diffusers.hooks import apply_group_offloading
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    apply_group_offloading(
        model, onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level",
        use_stream=True, record_stream=True,
    )  # fmt: skip
    return lambda ids: model(ids, use_cache=False, logits_to_keep=1)


def load_airllm(folder: Path) -> Forward:
    import airllm

    model = airllm.AutoModel.from_pretrained(str(folder), device="cuda:0", dtype=torch.bfloat16)
    return lambda ids: model(input_ids=ids, use_cache=False)


CONTENDERS = [
    Contender("mhaffn", "ssd", "mhaffn", load_mhaffn("ssd")),
    Contender("accelerate, device_map disk", "ssd", "accelerate", load_accelerate("disk")),
    Contender("AirLLM", "ssd", "airllm", load_airllm),
    Contender("mhaffn", "dram", "mhaffn", load_mhaffn("dram")),
    Contender("diffusers, group offload by layer, leaf level, stream", "dram", "diffusers", load_diffusers),
    Contender("diffusers, group offload of the model, leaf level, stream", "dram", "diffusers", load_diffusers_whole),
    Contender("accelerate, device_map cpu", "dram", "accelerate", load_accelerate("cpu")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-70b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a contender's number: its own process
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(CONTENDERS[options.one], options.folder, options.prompt)))
        return
    total = write_random_shards(options.folder, options.shape, options.layers)
    results: dict[str, Any] = {
        "machine": describe(), "shape": options.shape, "layers": options.layers, "bytes": total, "rows": []
    }  # fmt: skip
    try:
        store = Store.open(options.folder)
        results["alone_before"] = speeds(store)
        for number, contender in enumerate(CONTENDERS):
            row = {"name": contender.name, "tier": contender.tier} | in_its_own_process(
                number, options.folder, options.prompt
            )
            results["rows"].append(row)
            print(line(row, total), flush=True)
        results["alone_after"] = speeds(store)
    finally:
        shutil.rmtree(options.folder)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


def in_its_own_process(number: int, folder: Path, prompt: int) -> dict[str, Any]:
    """What :func:`measure` finds, or why it was skipped."""
    needs = CONTENDERS[number].needs
    if importlib.util.find_spec(needs) is None:
        return {"skipped": f"pip install {needs}"}
    command = [sys.executable, __file__, "--folder", str(folder), "--prompt", str(prompt), "--one", str(number)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return {"skipped": "took more than 240 s"}
    if done.returncode:
        return {"skipped": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "failed"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(contender: Contender, folder: Path, prompt: int) -> dict[str, Any]:
    """Seconds a pass: the median of a few, each between two synchronised points."""
    started = time.perf_counter()
    forward = contender.load(folder)
    found: dict[str, Any] = {"load_s": time.perf_counter() - started}
    for phase, tokens in (("decode", 1), ("prefill", prompt)):
        ids = torch.randint(3, 900, (1, tokens), device="cuda")
        times = []
        for _ in range(PASSES + 1):
            if contender.tier == "ssd" and contender.needs != "mhaffn":  # past the cache; idle time would only help it
                drop_page_cache()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with torch.inference_mode():
                forward(ids)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
            if len(times) > 1 and sum(times) > PHASE_S:
                break
        found[phase] = {"tokens": tokens, "samples": times[1:], "seconds": statistics.median(times[1:])}
    found["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
    return found


def drop_page_cache() -> None:
    os.sync()
    with suppress(OSError):  # not allowed: peers then read from memory, which only helps them
        Path("/proc/sys/vm/drop_caches").write_text("3")


def speeds(store: Store) -> dict[str, float]:
    return {"ssd": max(ssd_speed(store) for _ in range(2)), "h2d": h2d_speed()}


def layer_count(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


def line(row: dict[str, Any], total: int) -> str:
    if "skipped" in row:
        return f"{row['tier']:5} {row['name']:58} {row['skipped']}"
    cells = [
        f"{p} {row[p]['seconds']:7.3f} s {total / row[p]['seconds'] / 2**30:6.2f} GiB/s" for p in ("decode", "prefill")
    ]
    return f"{row['tier']:5} {row['name']:58} {'   '.join(cells)}   load {row['load_s']:.0f} s"


if __name__ == "__main__":
    main()

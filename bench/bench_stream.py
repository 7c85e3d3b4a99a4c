"""The stream under pytest-benchmark: passes beside their slowest link alone, and beside other ways to run from disk.

    pytest bench/bench_stream.py --benchmark-only --basetemp=/mnt/fast/bench
    pytest bench/bench_stream.py -m gpu …                          eight layers of 70B width, and other tools

The disk is that of ``--basetemp``. What is measured, and how, is in ``stream_passes.py`` and ``stream_peers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import stream_passes
import stream_peers
import torch
from by_peer import CLOCK
from timer import environment

from mhaffn.random_model import write_random_model, write_random_shards
from mhaffn.store import Store

pytestmark = pytest.mark.benchmark(timer=CLOCK)
OURS, LINK = "mhaffn", "slowest link alone"
PROMPT = 2048
SHAPES = {"tiny": (4, []), "llama3-70b": (8, [PROMPT])}
MIXES = {
    "tiny": ["SSD only T=1", "half DRAM, half SSD T=1"],
    "llama3-70b": [
        "SSD only T=1", "half DRAM, half SSD T=1", "a third GPU, rest DRAM T=1", "DRAM only T=1",
        f"DRAM only T={PROMPT}",
    ],
}  # fmt: skip
PASSES = [
    pytest.param(shape, mix, peer, marks=[] if shape == "tiny" else [pytest.mark.gpu, pytest.mark.timeout(900)])
    for shape, mixes in MIXES.items()
    for mix in mixes
    for peer in (OURS, LINK)
]
OTHERS = [
    (f"{contender.tier} {phase}", contender.name)
    for phase in ("decode", "prefill")
    for contender in stream_peers.CONTENDERS
]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, dict[str, Any]]]:
    """By shape and mix what ``stream_passes`` measures; filled as tests ask for it."""
    return {}


def measured(shape: str, folder: Any) -> dict[str, dict[str, Any]]:
    layers, prompts = SHAPES[shape]
    write_random_model(folder, shape, layers)
    try:
        found = stream_passes.measured(Store.open(folder), prompts, 3)
        return {f"{row['mix']} T={row['tokens']}": row for row in found}
    finally:
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize(("shape", "case", "peer"), PASSES)
def test_passes(benchmark, shape, case, peer, rows, tmp_path_factory):
    if shape not in rows:
        rows[shape] = measured(shape, tmp_path_factory.mktemp("stream"))
    if case not in rows[shape]:
        pytest.skip("needs a CUDA GPU")
    row = rows[shape][case]
    alone = [sample / ratio for sample, ratio in zip(row["samples"], row["ratios"], strict=True)]
    kept = ("layers", "gib_per_s", "bound_link", "ratio", "predicted", "engine", "direct", "ssd_busy")
    benchmark.extra_info.update({name: row[name] for name in kept} | about())
    CLOCK.report(benchmark, f"{shape}, {case}", row["samples"] if peer == OURS else alone)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[tuple[str, str], dict[str, Any]]]]:
    """A checkpoint, and by contender what ``stream_peers`` measures."""
    folder = tmp_path_factory.mktemp("peers")
    write_random_shards(folder, "llama3-70b", SHAPES["llama3-70b"][0])
    yield folder, {}
    for path in folder.glob("*.safetensors"):
        path.unlink()


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("case", "peer"), OTHERS)
def test_other_tools(benchmark, case, peer, others):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    folder, found = others
    tier, phase = case.split()
    if (tier, peer) not in found:
        (number,) = (i for i, c in enumerate(stream_peers.CONTENDERS) if (c.tier, c.name) == (tier, peer))
        found[tier, peer] = stream_peers.in_its_own_process(number, folder, PROMPT)
    row = found[tier, peer]
    if "skipped" in row:
        pytest.skip(row["skipped"])
    benchmark.extra_info.update({name: row[name] for name in ("load_s", "peak_gpu_bytes")} | about())
    CLOCK.report(benchmark, case, row[phase]["samples"])


def about() -> dict[str, Any]:
    machine = environment()
    return {name: machine[name] for name in ("versions", "clocks", "commit")}

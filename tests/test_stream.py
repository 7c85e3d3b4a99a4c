"""The stream: every placement gives the resident model's tokens, and the trace tells what was read."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mhaffn
import mhaffn.runner
from mhaffn.config import order
from mhaffn.formats import Formats
from mhaffn.plan import TIERS, Tier
from mhaffn.report import make_report
from mhaffn.store import Store, pack
from tests.conftest import Model
from tests.streaming import greedy, load_placed, resident_tokens

PLACEMENTS = list(itertools.product(TIERS, repeat=4))


@pytest.mark.parametrize("engine", ["io_uring", pytest.param("threads", marks=pytest.mark.slow)])
def test_every_placement_gives_the_resident_tokens(engine: Any, tiny_model: Model) -> None:
    folder = tiny_model(num_hidden_layers=2)
    expected = resident_tokens(folder)
    for tiers in PLACEMENTS:
        with load_placed(folder, tiers, engine=engine, device="cpu") as model:
            assert greedy(model) == expected, tiers


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("placements", [PLACEMENTS[::4], pytest.param(PLACEMENTS, marks=pytest.mark.slow)])
def test_every_placement_with_copies(placements: list[tuple[Tier, ...]], tiny_model: Model) -> None:
    folder = tiny_model(num_hidden_layers=2)
    expected = resident_tokens(folder)
    for tiers in placements:
        with load_placed(folder, tiers) as model:
            assert greedy(model) == expected, tiers


FEW_BITS = {
    "int4": Formats.parse("int4:32", "int4:32"),
    "int8": Formats.parse("int8", "int8"),
    "a mix": Formats.parse("fp8", "int4:64:zeros", ["1=int8:32"]),
}


@pytest.fixture(scope="module")
def few_bits(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    source = tiny_model(
        num_hidden_layers=2, hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    packed = {
        name: pack(source, tmp_path_factory.mktemp("few") / "store", formats=formats).path
        for name, formats in FEW_BITS.items()
    }
    return packed.__getitem__


@pytest.mark.parametrize("placements", [PLACEMENTS[::10], pytest.param(PLACEMENTS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.parametrize("with_copies", [False, True])
def test_placements_of_weights_in_few_bits(
    with_copies: bool, name: str, placements: list[tuple[Tier, ...]], few_bits: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    folder = few_bits(name)
    expected = resident_tokens(folder)
    if with_copies:
        request.getfixturevalue("copying")
    for tiers in placements:
        with load_placed(folder, tiers, device="cpu") as model:
            assert greedy(model) == expected, tiers


@pytest.mark.gpu
@pytest.mark.parametrize("name", FEW_BITS)
def test_placements_of_weights_in_few_bits_on_the_gpu(name: str, few_bits: Callable[[str], Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    folder = few_bits(name)
    with load_placed(folder, ("gpu",) * 4, device="cuda") as model:
        expected = greedy(model)
    for tiers in PLACEMENTS[::4]:
        with load_placed(folder, tiers, device="cuda") as model:
            assert greedy(model) == expected, tiers


@pytest.mark.usefixtures("copying")
def test_a_model_opened_in_inference_mode_streams_too(tiny_model: Model) -> None:
    folder = tiny_model(num_hidden_layers=2)
    expected = resident_tokens(folder)
    with torch.inference_mode(), load_placed(folder, ("ssd", "dram", "ssd", "gpu")) as model:
        assert greedy(model) == expected


@pytest.mark.gpu
def test_every_placement_on_the_gpu(tiny_model: Model) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    folder = tiny_model(num_hidden_layers=2)
    with load_placed(folder, ("gpu",) * 4, device="cuda") as model:
        expected = greedy(model)
    for tiers in PLACEMENTS:
        with load_placed(folder, tiers, device="cuda") as model:
            assert greedy(model) == expected, tiers


def test_the_trace_counts_every_byte_once_a_pass(tiny_model: Model) -> None:
    folder = tiny_model()
    store = Store.open(folder)
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu") as model:
        greedy(model, 5)
        model.close()
        spans = list(model.runner.trace.spans)
    for sublayer, records in store.sublayers.items():
        reads = [s for s in spans if s.lane == "ssd" and s.sublayer == sublayer]
        computes = [s for s in spans if s.lane == sublayer.kind and s.sublayer == sublayer]
        assert len(computes) == 5 and len(reads) >= 5
        assert all(read.nbytes == records.nbytes for read in reads)
    assert [s.sublayer for s in spans if s.lane in ("mha", "ffn")] == list(order(3)) * 5


@pytest.mark.parametrize("verify", [True, False])
def test_the_report_tells_what_verifying_cost(verify: bool, tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "packed")
    streamed = dict.fromkeys(order(store.config.num_layers), "ssd")
    with mhaffn.load(store.path, device="cpu", tiers=streamed, verify=verify) as model:
        greedy(model)
        report = make_report(model.runner.trace, "decode")
    assert report is not None
    read = sum(row.nbytes for row in report.rows if row.lane == "ssd")
    assert (report.checks is not None) == verify
    if report.checks is not None:
        assert report.checks.nbytes == read > 0
        assert 0 < report.checks.cpu_s < report.seconds_per_pass * os.cpu_count()  # type: ignore[operator]


def test_odd_offsets_in_a_foreign_file_are_read_right(tiny_model: Model, tmp_path: Path) -> None:
    """A header of odd length puts every tensor at an odd address, where no typed view exists."""
    folder = shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    expected = resident_tokens(tiny_model(dtype="bfloat16"))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :])
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu") as model:
        assert greedy(model) == expected


def test_two_models_stream_the_same_store_at_once(tiny_model: Model) -> None:
    folder = tiny_model()
    expected = resident_tokens(folder)
    with (
        mhaffn.load(folder, gpu=None, dram=None, device="cpu") as first,
        mhaffn.load(folder, gpu=None, dram=None, device="cpu") as second,
    ):
        results: list[list[int]] = []
        threads = [threading.Thread(target=lambda m=m: results.append(greedy(m))) for m in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected, expected]

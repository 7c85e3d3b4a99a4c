"""Profiles of machines: kept whole, refused when damaged, and scaled to models that were not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhaffn.config import ModelConfig
from mhaffn.errors import ConfigError
from mhaffn.forecast import changes, forecast
from mhaffn.planning import Hardware, machine_for
from mhaffn.profile import Compute, Profile, Widths
from mhaffn.shapes import SHAPES
from mhaffn.sizes import Workload

CONFIG = ModelConfig("LlamaForCausalLM", 8, 4096, 14336, 32, 8, 128, 32000, 1e-5, 8192, False)
WIDTHS = Widths.of(CONFIG)
PROFILE = Profile(
    ssd=5e9, h2d=40e9, gpu_bytes=20 << 30, dram_bytes=50 << 30, direct=True,
    compute=(
        Compute("mha", WIDTHS, 1, 1e-4), Compute("mha", WIDTHS, 2048, 5e-3),
        Compute("ffn", WIDTHS, 1, 3e-4), Compute("ffn", WIDTHS, 2048, 15e-3),
    ),
    measured_on={"gpu": {"name": "A GPU"}, "date": "2026-01-02T03:04:05"},
)  # fmt: skip
WITHOUT_GPU = replace(PROFILE, h2d=None, gpu_bytes=None, measured_on={"cpu": "A CPU"})
WORK = Workload(tokens=2048, context=4096)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for profile in (PROFILE, WITHOUT_GPU):
        profile.write(tmp_path / "new folder" / "profile.json")
        assert Profile.read(tmp_path / "new folder" / "profile.json") == profile
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"ssd": 0}, "0, expected a positive number"),
        ({"ssd": "fast"}, "'fast', expected a positive number"),
        ({"h2d": float("inf")}, "expected a positive number"),
        ({"compute": []}, "both kinds"),
        ({"compute": [{"kind": "moe"}]}, "kind 'moe', expected mha or ffn"),
        ({"compute": 3}, "no profile of a machine"),
        ({"compute": [{"kind": "mha", "widths": [], "tokens": 1, "seconds": 1}]}, "no profile of a machine"),
        ({"compute": [{"kind": "mha", "widths": {}, "tokens": 0.5, "seconds": 1}]}, "no profile of a machine"),
        ({"measured_on": 3}, "no profile of a machine"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as caught:
        Profile.read(path)
    assert "profile.json" in str(caught.value) and "mhaffn doctor --measure" in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile\.json does not exist"):
        Profile.read(tmp_path / "profile.json")
    (tmp_path / "profile.json").write_text("{")
    with pytest.raises(ConfigError, match=r"profile\.json"):
        Profile.read(tmp_path / "profile.json")


def test_measured_widths_take_what_was_measured() -> None:
    machine = PROFILE.machine(CONFIG, None, None, WORK)
    assert machine.compute_s == {"prefill": {"mha": 5e-3, "ffn": 15e-3}, "decode": {"mha": 1e-4, "ffn": 3e-4}}
    assert (machine.gpu, machine.dram) == (20 << 30, 50 << 30)
    assert (machine.links.ssd, machine.links.h2d) == (5e9, 40e9)


@given(st.integers(1, 6), st.integers(1, 1 << 15))
def test_other_widths_and_tokens_follow_bytes_and_operations(factor: int, tokens: int) -> None:
    wider = replace(CONFIG, hidden_size=CONFIG.hidden_size * factor, num_heads=32 * factor, num_kv_heads=8 * factor)
    assert PROFILE.compute_s(wider, "ffn", 1) == pytest.approx(3e-4 * factor)
    weights, cache = 2 * 2 * 4096 * 128 * (32 + 8), 2 * 2 * 8 * 128 * 2048
    read = (weights * factor**2 + cache * factor) / (weights + cache)
    assert PROFILE.compute_s(wider, "mha", 1) == pytest.approx(1e-4 * read)
    read = (weights + cache / 2048 * tokens) / (weights + cache)
    assert PROFILE.compute_s(CONFIG, "mha", 1, seen=tokens) == pytest.approx(1e-4 * read)
    times = [PROFILE.compute_s(wider, "mha", n) for n in (tokens, tokens + 1)]
    assert times[0] <= times[1] or tokens == 2048, "as measured there"
    if tokens > 2048:
        assert PROFILE.compute_s(CONFIG, "ffn", tokens) == pytest.approx(15e-3 * tokens / 2048)


def test_budgets_of_a_machine_without_gpu_hold_once_what_the_model_needs_beside() -> None:
    machine = WITHOUT_GPU.machine(CONFIG, None, None, WORK)
    assert machine.gpu is None and machine.links.h2d is None
    assert machine.dram == 50 << 30, "a plan counts it"
    assert WITHOUT_GPU.machine(CONFIG, None, 1 << 30, WORK).dram == 1 << 30
    streamed = forecast("streamed", CONFIG, replace(machine, dram=None))
    least = replace(WITHOUT_GPU, dram_bytes=streamed.plan.dram_bytes)
    assert forecast("as it is", CONFIG, least.machine(CONFIG, None, None, WORK)).plan.dram_bytes <= least.dram_bytes
    base = changes(CONFIG, machine)[0]
    assert base.plan.count("dram") == 16 and base.passes["decode"].binding == "compute"


def test_figures_given_count_before_measured_ones_and_those_before_typical_ones() -> None:
    machine, source = machine_for(CONFIG, Hardware(), PROFILE, WORK)
    assert machine == PROFILE.machine(CONFIG, None, None, WORK) and source == "A GPU, measured 2026-01-02"
    machine, source = machine_for(CONFIG, Hardware(ssd=7e9, gpu=9 << 30), PROFILE, WORK)
    assert (machine.links.ssd, machine.links.h2d, machine.gpu, machine.dram) == (7e9, 40e9, 9 << 30, 50 << 30)
    assert machine.compute_s["decode"] == {"mha": 1e-4, "ffn": 3e-4}
    assert source == "A GPU, measured 2026-01-02; given: --gpu, --ssd"
    machine, _ = machine_for(CONFIG, Hardware(hbm=1e12), PROFILE, WORK)
    assert machine.compute_s["decode"]["ffn"] == pytest.approx(3 * 4096 * 14336 * 2 / 1e12, rel=0.01)
    machine, source = machine_for(CONFIG, Hardware(flops=5e13), None, WORK)
    assert (machine.links.ssd, machine.gpu) == (5e9, 16 << 30)
    assert source == "a typical machine; given: --tflops"


def test_a_long_prompt_attends_to_itself_and_a_token_reads_its_keys_and_values() -> None:
    long = Workload(tokens=131072, context=131072)
    machine, _ = machine_for(SHAPES["llama3-70b"], Hardware(flops=1e14, hbm=1e12), None, long)
    products, attention = 2 * 2 * 8192 * 128 * (64 + 8) * 131072, 2 * 131072**2 * 64 * 128
    assert machine.compute_s["prefill"]["mha"] == pytest.approx((products + attention) / 1e14)
    assert machine.compute_s["prefill"]["ffn"] == pytest.approx(2 * 3 * 8192 * 28672 * 131072 / 1e14)
    read = 2 * 2 * 8192 * 128 * (64 + 8) + 2 * 2 * 8 * 128 * 131072
    assert machine.compute_s["decode"]["mha"] == pytest.approx(read / 1e12)


def test_a_profile_without_gpu_tells_of_its_disk_where_a_gpu_is_planned_for() -> None:
    machine, source = machine_for(CONFIG, Hardware(gpu=16 << 30), replace(WITHOUT_GPU, ssd=3e9), WORK)
    assert (machine.links.ssd, machine.links.h2d, machine.dram) == (3e9, 25e9, 50 << 30)
    assert source.startswith("SSD and DRAM of A CPU")
    machine, _ = machine_for(CONFIG, Hardware(ssd=4e9, dram=9 << 30), WITHOUT_GPU, WORK)
    assert (machine.links.ssd, machine.links.h2d, machine.dram) == (4e9, None, 9 << 30)

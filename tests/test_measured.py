"""The measured figures of one machine give the derived ones published with them, and our bound beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhaffn.errors import ConfigError
from mhaffn.measured import Measured, analyse, outlook

SEED = Path(__file__).parent / "data" / "seed.json"
NEAR = 0.011  # the figures are sums and differences of inputs rounded to 0.01 ms


@pytest.fixture(scope="module")
def seed() -> Measured:
    return Measured.read(SEED)


def test_prefill(seed: Measured) -> None:
    layer = analyse(seed)["prefill"]
    assert layer.total_compute_ms == pytest.approx(178.36, abs=NEAR)
    assert layer.compute_share("mha") == pytest.approx(0.855, abs=0.001)
    assert layer.compute_share("ffn") == pytest.approx(0.145, abs=0.001)
    assert layer.serial_ms == pytest.approx(391.88, abs=NEAR)
    assert layer.sublayer_bound_ms("mha") == pytest.approx(152.42, abs=NEAR)
    assert layer.sublayer_bound_ms("ffn") == pytest.approx(142.54, abs=NEAR)
    assert layer.wait_ms("mha") == 0
    assert layer.wait_ms("ffn") == pytest.approx(116.60, abs=NEAR)
    assert layer.ideal_ms == pytest.approx(294.96, abs=NEAR)
    assert round(layer.ideal_speedup, 2) == 1.33
    assert layer.bound_ms == pytest.approx(193.24, abs=NEAR)


def test_decode(seed: Measured) -> None:
    layer = analyse(seed)["decode"]
    assert layer.total_compute_ms == pytest.approx(2.26, abs=NEAR)
    assert layer.compute_share("mha") == pytest.approx(0.303, abs=0.002)
    assert layer.serial_ms == pytest.approx(215.77, abs=NEAR)
    assert layer.sublayer_bound_ms("mha") == pytest.approx(70.97, abs=NEAR)
    assert layer.wait_ms("mha") == pytest.approx(70.28, abs=NEAR)
    assert layer.wait_ms("ffn") == pytest.approx(140.97, abs=NEAR)
    assert layer.ideal_ms == pytest.approx(213.51, abs=NEAR)
    assert round(layer.ideal_speedup, 2) == 1.01
    assert (layer.prefetch_layers("mha"), layer.prefetch_layers("ffn")) == (104, 91)
    assert layer.bound_ms == pytest.approx(193.24, abs=NEAR)


def test_shares_of_serial_time(seed: Measured) -> None:
    prefill, decode = analyse(seed)["prefill"], analyse(seed)["decode"]
    shares = {
        "mha compute": (prefill.compute_ms["mha"] / prefill.serial_ms, 0.389),
        "ffn compute": (prefill.compute_ms["ffn"] / prefill.serial_ms, 0.066),
        "mha ssd": (seed.ssd_ms["mha"] / prefill.serial_ms, 0.164),
        "ffn ssd": (seed.ssd_ms["ffn"] / prefill.serial_ms, 0.329),
        "decode mha ssd": (seed.ssd_ms["mha"] / decode.serial_ms, 0.298),
        "decode ffn ssd": (seed.ssd_ms["ffn"] / decode.serial_ms, 0.598),
    }
    for name, (got, printed) in shares.items():
        assert got == pytest.approx(printed, abs=0.001), name


def test_outlook_reaches_the_bound_and_shows_both_widths(seed: Measured) -> None:
    steps = outlook(seed)
    assert [step.name for step in steps[:3]] == ["all from SSD", "+ 64 GiB DRAM", "+ 15 GiB GPU"]
    first = steps[0].passes
    assert first["prefill"].bound_s == pytest.approx(80 * 0.19324, rel=1e-3)
    assert first["decode"].bound_s == pytest.approx(80 * 0.19324, rel=1e-3)
    assert all(p.bound_s * 0.999 <= p.seconds <= 1.03 * p.bound_s for step in steps for p in step.passes.values())
    for group in (steps[:5], steps[5:]):
        seconds = [step.passes["decode"].seconds for step in group]
        assert seconds == sorted(seconds, reverse=True)
        assert all(step.plan.gpu_bytes <= seed.gpu for step in group[2:])
        assert all(step.plan.dram_bytes <= seed.dram for step in group[1:])
    published = steps[5]
    assert published.name == "F 28672: all from SSD"
    assert published.passes["decode"].seconds == pytest.approx(80 * (0.28125 + 1.3125) * 2**30 / 4.6911e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssd_ms": {"mha": 1.0}}, "ffn"),
        ({"ssd_ms": None}, "expected layers"),
        ({"layers": "many"}, "many"),
        ({"h2d_ms": {"mha": 0, "ffn": 1}}, "must be between"),
        ({"compute_ms": {"prefill": {"mha": 1, "ffn": 1}}}, "decode"),
        ({"prompt_tokens": 0}, "prompt_tokens = 0"),
        ({"dram_gib": -1}, "dram_gib = -1.0"),
        ({"gpu_gib": float("inf")}, "gpu_gib = inf"),
        ({"gpu_gib": 1e300}, r"gpu_gib = 1e\+300"),
        ({"compute_ms": {phase: {"mha": 1e-320, "ffn": 1} for phase in ("prefill", "decode")}}, "must be between"),
        ({"published_intermediate_size": -5}, "published_intermediate_size = -5"),
        ({"published_intermediate_size": "28672"}, "published_intermediate_size = '28672'"),
    ],
)
def test_figures_that_cannot_be_used_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(json.loads(SEED.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        Measured.read(path)
    with pytest.raises(ConfigError, match="does not exist"):
        Measured.read(tmp_path / "missing.json")


def test_a_file_that_holds_no_figures_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    for content in ("[" * 200000, "[1]", "no JSON"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"measured\.json"):
            Measured.read(path)
    path.write_text(json.dumps(json.loads(SEED.read_text()) | {"name": "a \ud800 b"}))
    assert Measured.read(path).name == "a ? b"


def test_a_machine_may_lend_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(json.loads(SEED.read_text()) | {"dram_gib": 0, "gpu_gib": 0}))
    assert all(step.plan.count("ssd") == 160 for step in outlook(Measured.read(path)))

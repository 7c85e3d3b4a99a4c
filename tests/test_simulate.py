"""The simulator: never faster than physics, as fast as physics where buffers allow, and like the stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhaffn.config import ModelConfig, order
from mhaffn.plan import TIERS, Plan, Tier, make_plan
from mhaffn.simulate import Links, Work, predict
from mhaffn.sizes import Sizes

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", num_layers=6, hidden_size=1024, intermediate_size=4096, num_heads=8,
    num_kv_heads=2, head_dim=128, vocab_size=1000, norm_eps=1e-5, max_position_embeddings=4096,
    tie_word_embeddings=False,
)  # fmt: skip


def planned(tiers: list[Tier], copies: bool = True, prefetch: int = 2) -> Plan:
    placed = dict(zip(order(CONFIG.num_layers), tiers, strict=True))
    return make_plan(CONFIG, "bfloat16", copies=copies, tiers=placed, prefetch=prefetch)


def work(mha_s: float, ffn_s: float) -> dict:  # type: ignore[type-arg]
    sizes = Sizes(CONFIG, "bfloat16")
    return {s: Work(sizes.weights(s), mha_s if s.kind == "mha" else ffn_s) for s in order(CONFIG.num_layers)}


placements = st.lists(st.sampled_from(TIERS), min_size=12, max_size=12)
seconds = st.floats(1e-5, 0.05)
speeds = st.floats(1e8, 1e11)


@given(placements, seconds, seconds, speeds, speeds, st.booleans(), st.integers(1, 4))
def test_no_pass_beats_the_bound_or_takes_longer_than_serial(
    tiers: list[Tier], mha_s: float, ffn_s: float, ssd: float, h2d: float, copies: bool, prefetch: int
) -> None:
    got = predict(planned(tiers, copies, prefetch), work(mha_s, ffn_s), Links(ssd, h2d if copies else None))
    assert got.bound_s * (1 - 1e-9) <= got.seconds <= (got.ssd_s + got.h2d_s + got.compute_s) * (1 + 1e-9)


@pytest.mark.parametrize(("tier", "binding"), [("ssd", "SSD"), ("dram", "copy"), ("gpu", "compute")])
def test_one_tier_reaches_the_bound_of_its_link(tier: Tier, binding: str) -> None:
    got = predict(planned([tier] * 12), work(1e-4, 2e-4), Links(5e9, 50e9))
    assert got.binding == binding
    assert got.seconds == pytest.approx(got.bound_s, rel=0.01)


def test_long_compute_hides_all_transfers() -> None:
    got = predict(planned(["ssd"] * 12), work(0.05, 0.05), Links(5e9, 50e9))
    assert got.binding == "compute" and got.seconds == pytest.approx(got.bound_s, rel=1e-6)


def test_more_of_anything_never_hurts() -> None:
    tiers: list[Tier] = ["ssd", "dram"] * 6
    base = Links(3e9, 20e9)
    slow = predict(planned(tiers), work(1e-3, 2e-3), base).seconds
    for links in (replace(base, ssd=6e9), replace(base, h2d=40e9)):
        assert predict(planned(tiers), work(1e-3, 2e-3), links).seconds <= slow * (1 + 1e-9)
    assert predict(planned(["dram"] * 12), work(1e-3, 2e-3), base).seconds <= slow

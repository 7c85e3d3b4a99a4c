"""Plans keep their promises: every sublayer placed once, no budget exceeded, minimums that really suffice."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhaffn.config import KINDS, ModelConfig, Sublayer, order
from mhaffn.errors import BudgetError, ConfigError
from mhaffn.formats import Formats
from mhaffn.plan import (
    HOST_LIBRARY_BYTES,
    LIBRARY_BYTES,
    SHORT_PREFETCH_GAIN,
    STAGING_BYTES,
    TIERS,
    TYPICAL,
    Plan,
    Speeds,
    Tier,
    make_plan,
)
from mhaffn.simulate import Links, Work, predict
from mhaffn.sizes import CHUNK_TOKENS, PAGE, Sizes, Workload

WORK = Workload(tokens=16, context=64)


def model(
    layers: int = 8, hidden: int = 96, ffn: int = 128, heads: int = 4, kv_heads: int = 4, vocab: int = 64, **more: Any
) -> ModelConfig:
    return ModelConfig("LlamaForCausalLM", layers, hidden, ffn, heads, kv_heads, hidden // heads, vocab, 1e-5, 4096,
                       more.get("tied", False))  # fmt: skip


models = st.builds(
    model,
    layers=st.integers(1, 12),
    hidden=st.sampled_from([64, 512, 2048]),
    ffn=st.sampled_from([64, 1000, 8192]),
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
)
shares = st.none() | st.floats(0, 1.6)


def images(config: ModelConfig, dtype: str = "bfloat16") -> dict[Sublayer, int]:
    sizes = Sizes(config, dtype)
    return {sublayer: sizes.image(sublayer) for sublayer in order(config.num_layers)}


def check(plan: Plan, config: ModelConfig, dtype: str, gpu: int | None, dram: int | None, copies: bool) -> None:
    sizes = images(config, dtype)
    assert list(plan.tiers) == list(order(config.num_layers)), "each once, in pass order"
    assert set(plan.tiers.values()) <= set(TIERS)
    for tier in TIERS:
        assert plan.count(tier) == len([s for s in plan.tiers if plan.tiers[s] == tier])
    assert sorted(plan.streamed()) == sorted(plan.streamed("dram") + plan.streamed("ssd"))
    assert plan.gpu_tier_bytes == sum(sizes[s] for s, tier in plan.tiers.items() if tier == "gpu")
    assert plan.dram_tier_bytes == sum(sizes[s] for s in plan.streamed("dram"))
    if copies:
        assert gpu is None or plan.gpu_bytes <= gpu
        assert bool(plan.slot_bytes) is bool(plan.streamed())
    else:
        assert plan.slot_bytes == 0
        assert plan.count("gpu") == 0
    assert dram is None or plan.dram_bytes <= dram
    assert bool(plan.staging_bytes) is bool(plan.count("ssd"))
    for ring, streamed in ((plan.staging_bytes, plan.streamed("ssd")), (plan.slot_bytes, plan.streamed())):
        if ring:
            window = [sizes[sublayer] for sublayer in streamed] * 3
            held = max(sum(window[i : i + 2]) for i in range(len(streamed)))
            assert ring >= held, "the sublayer in use and the next one"
    assert plan.prefetch >= 1
    assert plan.describe().startswith(f"{len(sizes)} sublayers: ")


@given(config=models, dtype=st.sampled_from(["bfloat16", "float32"]), gpu=shares, dram=shares, copies=st.booleans(),
       prefetch=st.integers(1, 5))  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_budgets_are_never_exceeded_and_minimums_suffice(
    config: ModelConfig, dtype: str, gpu: float | None, dram: float | None, copies: bool, prefetch: int
) -> None:
    everything = sum(images(config, dtype).values())
    sizes = Sizes(config, dtype)
    fixed = sizes.resident() + sizes.kv_cache(WORK) + sizes.activations(WORK) + LIBRARY_BYTES
    budgets: dict[str, int | None] = {
        "gpu": None if gpu is None or not copies else int(fixed * min(gpu + 0.3, 1) + everything * gpu),
        "dram": None if dram is None else int(everything * dram),
    }
    for _ in range(3):  # each error raises one budget to the minimum it names
        try:
            plan = make_plan(config, dtype, **budgets, copies=copies, work=WORK, prefetch=prefetch)
        except BudgetError as error:
            option, least = named_minimum(error)
            budget = budgets[option]
            assert budget is not None
            assert budget < least, f"{option} of {budget} refused, but the minimum is said to be {least}"
            budgets[option] = least
        else:
            check(plan, config, dtype, budgets["gpu"], budgets["dram"], copies)
            return
    raise AssertionError("the minimums named do not suffice")


@given(config=models, over_gpu=st.floats(0, 1), over_dram=st.floats(0, 1.5))
@settings(max_examples=300, deadline=None)
def test_what_gpu_leaves_may_just_fit_dram(config: ModelConfig, over_gpu: float, over_dram: float) -> None:
    """The GPU's last bytes may hold no whole sublayer: what is left over then needs more than DRAM seemed to."""
    sizes, least = images(config), make_plan(config, "bfloat16", copies=True, work=WORK).gpu_bytes
    everything, room = sum(sizes.values()), int(sum(sizes.values()) * over_gpu)
    dram = everything - room + int(max(sizes.values()) * over_dram)
    try:
        plan = make_plan(config, "bfloat16", gpu=least + room, dram=dram, copies=True, work=WORK)
    except BudgetError as error:
        assert dram < named_minimum(error)[1]
    else:
        check(plan, config, "bfloat16", least + room, dram, True)


@pytest.mark.parametrize(("tier", "option"), [("gpu", "gpu"), ("dram", "dram"), ("dram", "gpu"), ("ssd", "dram")])
def test_the_minimum_of_a_placement_by_hand(tier: Tier, option: str) -> None:
    config = model(layers=4, hidden=512)
    tiers = dict.fromkeys(order(4), tier)
    with pytest.raises(BudgetError) as caught:
        make_plan(config, "bfloat16", copies=True, work=WORK, tiers=tiers, **{option: 1 << 20})
    named, least = named_minimum(caught.value)
    assert named == option
    plan = make_plan(config, "bfloat16", copies=True, work=WORK, tiers=tiers, **{option: least})
    assert plan.tiers == tiers
    with pytest.raises(BudgetError):
        make_plan(config, "bfloat16", copies=True, work=WORK, tiers=tiers, **{option: least - 1})


def named_minimum(error: BudgetError) -> tuple[str, int]:
    found = re.match(
        r"--(gpu|dram) .* is too small: this model needs at least .* there \((\d+) bytes\). Raise it", str(error)
    )
    assert found, str(error)
    return found[1], int(found[2])


@pytest.mark.parametrize("copies", [True, False])
def test_without_budgets_everything_streams_from_ssd(copies: bool) -> None:
    plan = make_plan(model(), "bfloat16", copies=copies, work=WORK)
    assert plan.count("ssd") == 16
    assert plan.staging_bytes >= STAGING_BYTES or plan.staging_bytes >= sum(images(model()).values())
    assert plan.dram_tier_bytes == plan.gpu_tier_bytes == 0


def test_large_budgets_leave_nothing_to_stream() -> None:
    plan = make_plan(model(), "bfloat16", gpu=1 << 40, copies=True, work=WORK)
    assert (plan.count("gpu"), plan.slot_bytes, plan.staging_bytes) == (16, 0, 0)
    plan = make_plan(model(), "bfloat16", dram=1 << 40, copies=False, work=WORK)
    assert (plan.count("dram"), plan.staging_bytes) == (16, 0)
    plan = make_plan(model(), "bfloat16", dram=1 << 40, copies=True, work=WORK)
    assert (plan.count("dram"), plan.staging_bytes) == (16, 0)
    assert plan.slot_bytes > 0


def test_more_budget_never_streams_more() -> None:
    config = model(layers=12, hidden=512, ffn=1000)
    sizes = images(config)
    everything = before = sum(sizes.values())
    ring = make_plan(config, "bfloat16", copies=False, work=WORK).dram_bytes
    for dram in range(ring, everything + ring + 2, max(everything // 40, 1)):
        plan = make_plan(config, "bfloat16", dram=dram, copies=False, work=WORK)
        streamed = sum(sizes[sublayer] for sublayer in plan.streamed("ssd"))
        assert streamed <= before
        before = streamed
    assert before == 0


@given(layers=st.integers(2, 60), share=st.floats(0.05, 0.95))
@settings(max_examples=150, deadline=None)
def test_what_stays_on_ssd_is_spread_over_the_pass(layers: int, share: float) -> None:
    config = model(layers=layers, hidden=512, ffn=683)  # sublayers of 2 MiB, the grain of host memory
    sizes = images(config)
    assert max(sizes.values()) <= 1.2 * min(sizes.values()), "nearly equal, so that counts measure the spread"
    ring = 3 * max(sizes.values()) + Sizes(config, "bfloat16").fixed(WORK) + HOST_LIBRARY_BYTES
    plan = make_plan(
        config, "bfloat16", dram=int(sum(sizes.values()) * share) + ring, copies=False, work=WORK, prefetch=1
    )
    on_ssd = [tier == "ssd" for tier in plan.tiers.values()]
    assume(any(on_ssd))
    mean = sum(on_ssd) / len(on_ssd)
    cycle = on_ssd * 2
    for length in range(1, len(on_ssd) + 1):
        counts = [sum(cycle[i : i + length]) for i in range(len(on_ssd))]
        assert max(counts) <= mean * length + 3
        assert min(counts) >= mean * length - 3


def test_without_memory_of_its_own_a_device_computes_from_the_host_budget() -> None:
    least = make_plan(model(), "bfloat16", copies=False, work=WORK, prefetch=1)
    assert least.gpu_bytes == 0 and least.dram_bytes > least.fixed_bytes > Sizes(model(), "bfloat16").fixed(WORK)
    assert make_plan(model(), "bfloat16", dram=least.dram_bytes, copies=False, work=WORK).dram_bytes <= least.dram_bytes
    with pytest.raises(BudgetError, match=rf"at least .*\({least.dram_bytes} bytes\)"):
        make_plan(model(), "bfloat16", dram=least.dram_bytes - 1, copies=False, work=WORK)


def test_what_is_placed_on_the_gpu_of_a_device_without_memory_counts_for_the_host() -> None:
    config = model(layers=4, hidden=512)
    tiers: dict[Sublayer, Tier] = dict.fromkeys(order(4), "gpu")
    plan = make_plan(config, "bfloat16", copies=False, work=WORK, tiers=tiers)
    assert plan.gpu_bytes == 0 and plan.dram_bytes >= plan.fixed_bytes + sum(images(config).values())
    with pytest.raises(BudgetError, match=rf"at least .*\({plan.dram_bytes} bytes\)"):
        make_plan(config, "bfloat16", dram=plan.dram_bytes - 1, copies=False, work=WORK, tiers=tiers)


def test_long_prompts_go_through_in_steps() -> None:
    """Activations grow with the prompt by its hidden states alone once it takes more than one step."""
    sizes = Sizes(model(), "bfloat16")
    short, long = (sizes.activations(Workload(tokens=n, context=n)) for n in (CHUNK_TOKENS, 8 * CHUNK_TOKENS))
    assert long - short == 7 * CHUNK_TOKENS * 4 * model().hidden_size * 2


def test_a_model_of_more_layers_than_are_simulated_has_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhaffn.plan.SIMULATED_SUBLAYERS", 1)
    assert make_plan(model(), "bfloat16", gpu=1 << 40, dram=1 << 40, copies=True, speeds=TYPICAL).count("gpu")


@pytest.mark.parametrize(("dtype", "per_position"), [("float32", 6), ("bfloat16", 0)])
def test_attention_in_float32_holds_masks_on_a_gpu(dtype, per_position) -> None:
    """Which keys each query sees, in bool and as a bias: it is PyTorch's, that of 16 bits is ours."""
    works = [Workload(tokens=16, context=context) for context in (64, 1064)]
    short, long = (make_plan(model(), dtype, copies=True, work=work).fixed_bytes for work in works)
    sizes = Sizes(model(), dtype)
    assert long - short - (sizes.fixed(works[1]) - sizes.fixed(works[0])) == 16 * 1000 * per_position


@dataclass(frozen=True)
class Case:
    """A small model on a random machine, in one phase."""

    config: ModelConfig
    gpu: int | None
    dram: int | None
    speeds: Speeds

    def seconds(self, plan: Plan) -> float:
        sizes, (_, compute_s) = Sizes(self.config, "bfloat16"), self.speeds.passes[0]
        work = {s: Work(sizes.weights(s), compute_s[s.kind]) for s in plan.tiers}
        return predict(plan, work, self.speeds.links).seconds

    def plan(self, **options: Any) -> Plan:
        return make_plan(self.config, "bfloat16", gpu=self.gpu, dram=self.dram, copies=True, work=WORK, **options)


def random_case(seed: int, layers: int) -> Case:
    """Speeds, compute and budgets over all regimes: each link may bind, each budget may hold little or much."""
    draw = random.Random(seed)
    hidden, ffn, kv_heads = draw.choice([(4096, 14336, 8), (8192, 12288, 8), (8192, 28672, 8), (4096, 4096, 32)])
    config = model(layers, hidden, ffn, heads=32, kv_heads=kv_heads, vocab=1000)
    sizes = Sizes(config, "bfloat16")
    largest, everything = max(images(config).values()), sum(images(config).values())
    ssd, h2d = 10 ** draw.uniform(9, 10.3), 10 ** draw.uniform(9.5, 10.8)
    compute_s = {kind: draw.choice([0.01, 0.15, 0.5, 1]) * draw.uniform(0.5, 1.5) * everything / layers / ssd
                 for kind in KINDS}  # fmt: skip
    gpu = sizes.fixed(WORK) + LIBRARY_BYTES + 2 * largest + int(draw.random() * everything)
    dram = int(2.2 * largest + draw.random() * everything)
    return Case(
        config, None if draw.random() < 0.2 else gpu, None if draw.random() < 0.2 else dram,
        Speeds(Links(ssd, h2d), ((1.0, compute_s),)),
    )  # fmt: skip


def fastest(case: Case) -> float:
    """Seconds of the fastest of all placements, at any prefetch distance, that the budgets hold."""
    seconds = []
    for placement in itertools.product(TIERS, repeat=2 * case.config.num_layers):
        if (case.gpu is None and "gpu" in placement) or (case.dram is None and "dram" in placement):
            continue
        tiers = dict(zip(order(case.config.num_layers), placement, strict=True))
        for prefetch in (1, 2, 3, 4):
            try:
                plan = case.plan(tiers=tiers, prefetch=prefetch)
            except BudgetError:
                break
            seconds.append(case.seconds(plan))
    return min(seconds)


def check_optimal(seed: int, layers: int) -> None:
    """The tolerance is what a longer prefetch is worth on real links; the simulated ones do not jitter."""
    case = random_case(seed, layers)
    plan = case.plan(speeds=case.speeds)
    check(plan, case.config, "bfloat16", case.gpu, case.dram, True)
    assert case.seconds(plan) <= fastest(case) * SHORT_PREFETCH_GAIN * 1.001, plan.describe()


@pytest.mark.parametrize("seed", range(60))
def test_no_placement_of_two_layers_is_faster_than_the_plan(seed: int) -> None:
    check_optimal(seed, 2)


@pytest.mark.parametrize("seed", range(12))
def test_no_placement_of_three_layers_is_faster_than_the_plan(seed: int) -> None:
    check_optimal(1000 + seed, 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_no_placement_is_faster_than_the_plan(seed: int) -> None:
    check_optimal(2000 + seed, 2)
    check_optimal(3000 + seed, 3)


@pytest.mark.parametrize(("gpu", "dram"), [(16, 32), (8, 8), (None, 30), (15, 64), (60, 60), (200, None)])
def test_planning_80_layers_takes_less_than_a_second(gpu: int | None, dram: int | None) -> None:
    config = model(80, 8192, 28672, heads=64, kv_heads=8, vocab=128256)
    passes = ((1, {"mha": 0.1, "ffn": 0.05}), (100, {"mha": 1e-3, "ffn": 2e-3}))
    started = time.process_time()
    plan = make_plan(
        config, "bfloat16", gpu=gpu and gpu << 30, dram=dram and dram << 30, copies=True, work=WORK,
        speeds=Speeds(Links(5e9, 25e9), passes),
    )  # fmt: skip
    assert time.process_time() - started < 1
    check(plan, config, "bfloat16", gpu and gpu << 30, dram and dram << 30, True)


def test_tiers_by_hand() -> None:
    placed: dict[Sublayer, Tier] = {s: TIERS[i % 3] for i, s in enumerate(order(8))}
    plan = make_plan(model(), "bfloat16", copies=True, work=WORK, tiers=placed)
    assert plan.tiers == placed
    check(plan, model(), "bfloat16", None, None, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Sublayer(2, "ffn"): None}, "got tier 'none' for layer 2 ffn, expected gpu, dram, ssd for each of the 16"),
        ({Sublayer(7, "mha"): "DRAM"}, "got tier 'DRAM' for layer 7 mha, expected gpu, dram, ssd"),
        ({Sublayer(8, "mha"): "ssd"}, "got tier 'ssd' for layer 8 mha, expected .* of 8 layers, and no others"),
        ({"0.mha": "ssd"}, "got tier 'ssd' for 0.mha, expected .* and no others"),
    ],
)
def test_tiers_by_hand_of_other_sublayers_or_names_are_refused(change: dict[Any, Any], message: str) -> None:
    tiers: dict[Any, Any] = dict.fromkeys(order(8), "ssd") | change
    tiers = {sublayer: tier for sublayer, tier in tiers.items() if tier is not None}
    with pytest.raises(ConfigError, match=message):
        make_plan(model(), "bfloat16", copies=True, work=WORK, tiers=tiers)


def test_tiers_that_name_no_sublayers_are_refused() -> None:
    with pytest.raises(ConfigError, match="got tiers of type list, expected a mapping"):
        make_plan(model(), "bfloat16", copies=True, work=WORK, tiers=["ssd"] * 16)  # type: ignore[arg-type]


def test_sizes() -> None:
    config = model(layers=2, hidden=64, ffn=100, kv_heads=2, vocab=50)
    for dtype, itemsize in (("bfloat16", 2), ("float16", 2), ("float32", 4)):
        sizes = Sizes(config, dtype)
        assert sizes.weights(Sublayer(0, "mha")) == (64 * 64 * 2 + 32 * 64 * 2 + 64) * itemsize
        assert sizes.weights(Sublayer(1, "ffn")) == (3 * 64 * 100 + 64) * itemsize
        assert sizes.resident() == (2 * 50 * 64 + 64) * itemsize
        assert sizes.kv_cache(Workload(context=10, batch=3)) == 3 * 10 * 2 * 2 * 32 * itemsize
        for sublayer in order(2):
            weights, image = sizes.weights(sublayer), sizes.image(sublayer)
            assert weights <= image <= weights + 5 * 2 * PAGE


@pytest.mark.parametrize(
    "module",
    [
        "mhaffn",
        "mhaffn.errors",
        "mhaffn.config",
        "mhaffn.files",
        "mhaffn.plan",
        "mhaffn.simulate",
        "mhaffn.trace",
        "mhaffn.store",
        "mhaffn.store.format",
    ],
)
def test_planning_loads_neither_torch_nor_transformers(module: str) -> None:
    heavy = ("torch", "transformers", "numpy", "triton", "rich")
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


LAYER_FORMATS = st.lists(st.sampled_from(["plain", "int8", "int8:32", "int4:32", "int4:32:zeros", "fp8"]), min_size=24)


@given(
    layers=st.integers(1, 12), chosen=LAYER_FORMATS, gpu=st.floats(0.0, 1.2), dram=st.floats(0.05, 1.2),
    copies=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_layers_of_different_formats_fill_the_budgets(
    layers: int, chosen: list[str], gpu: float, dram: float, copies: bool
) -> None:
    config = model(layers, hidden=512, ffn=2048)
    names = [f"{s.layer}:{s.kind}={format}" for s, format in zip(order(layers), chosen, strict=False)]
    formats = Formats.parse(layers=names)
    sizes = Sizes(config, "bfloat16", formats)
    by_tensor = {s: tuple(sizes.tensors(s)) for s in order(layers)}
    assert Sizes(config, "bfloat16", stored=by_tensor).fixed(WORK) == sizes.fixed(WORK)
    everything = sum(sizes.image(s) for s in order(layers))
    budgets = {
        "gpu": int(sizes.fixed(WORK) + LIBRARY_BYTES + everything * gpu) if copies else None,
        "dram": int((0 if copies else sizes.fixed(WORK)) + everything * dram),
    }
    try:
        plan = make_plan(config, "bfloat16", **budgets, copies=copies, work=WORK, formats=formats)
    except BudgetError as error:
        option, least = named_minimum(error)
        assert (budgets[option] or 0) < least
        budgets[option] = least
        try:
            plan = make_plan(config, "bfloat16", **budgets, copies=copies, work=WORK, formats=formats)
        except BudgetError as again:
            assert named_minimum(again)[0] != option
            return
    assert list(plan.tiers) == list(order(layers))
    assert plan.dram_bytes <= (budgets["dram"] or 0) and plan.gpu_bytes <= (budgets["gpu"] or 0)
    assert plan.gpu_tier_bytes == sum(sizes.image(s) for s, tier in plan.tiers.items() if tier == "gpu")
    assert plan.dram_tier_bytes == sum(sizes.image(s) for s, tier in plan.tiers.items() if tier == "dram")


def test_what_needs_the_named_minimum_gets_a_plan_with_it() -> None:
    """Where layers differ, counting with their mean must not hide what fits."""
    config = model(5, hidden=512, ffn=2048)
    narrow = ["0:mha=fp8", "1:mha=int8", "1-2:ffn=int8:32", "3:ffn=int4:32:zeros", "4:mha=fp8"]
    formats = Formats.parse(layers=narrow)
    with pytest.raises(BudgetError) as small:
        make_plan(config, "bfloat16", dram=1 << 20, copies=False, work=WORK, formats=formats)
    _, least = named_minimum(small.value)
    plan = make_plan(config, "bfloat16", dram=least, copies=False, work=WORK, formats=formats)
    assert plan.dram_bytes == least
    with pytest.raises(BudgetError):
        make_plan(config, "bfloat16", dram=least - 1, copies=False, work=WORK, formats=formats)


def test_a_few_plain_layers_leave_the_others_their_memory() -> None:
    """What differs in a few layers must not be taken for what all take."""
    config = model(40, hidden=2048, ffn=8192)
    plain_ends = Formats.parse("int4:32", "int4:32", ["0-1,38-39=plain"])
    plans = {
        name: make_plan(config, "bfloat16", dram=1200 << 20, copies=True, work=WORK, formats=formats)
        for name, formats in (("alike", Formats.parse("int4:32", "int4:32")), ("ends", plain_ends))
    }
    used = {name: plan.dram_bytes for name, plan in plans.items()}
    largest = Sizes(config, "bfloat16").image(Sublayer(0, "ffn"))
    assert used["ends"] >= (1200 << 20) - 2 * largest
    assert used["alike"] >= (1200 << 20) - largest


def test_what_fits_the_memory_there_is_does_not_stay_on_ssd() -> None:
    """Where sizes differ, or a kind streams that is small beside the other, counts by the mean of a kind leave room."""
    mixed = Formats.parse("int8", "int4", ["0:ffn=int8"])
    large = model(32, hidden=8192, ffn=28672, heads=64, kv_heads=8)
    narrow = model(3, hidden=512, ffn=8192, heads=8, kv_heads=1)
    for config, formats, gpu, dram in (
        (large, mixed, 17551072869, 1127823227), (narrow, None, 600158544, 64425238),
    ):  # fmt: skip
        budgets: dict[str, Any] = {"gpu": gpu, "dram": dram, "copies": True, "work": WORK, "formats": formats}
        for speeds in (None, TYPICAL):
            plan = make_plan(config, "bfloat16", speeds=speeds, **budgets)
            assert not plan.count("ssd") and plan.gpu_bytes <= gpu and plan.dram_bytes <= dram


def test_the_named_minimum_of_host_memory_is_what_the_gpu_leaves() -> None:
    config = model(3, hidden=1024, ffn=8192, heads=8, kv_heads=1)
    sizes = Sizes(config, "bfloat16")
    mha, ffn = (sizes.image(Sublayer(0, kind)) for kind in KINDS)
    budgets: dict[str, Any] = {"gpu": sizes.fixed(WORK) + LIBRARY_BYTES + 3 * ffn + 2 * mha, "copies": True}
    with pytest.raises(BudgetError) as small:
        make_plan(config, "bfloat16", dram=0, work=WORK, **budgets)
    option, least = named_minimum(small.value)
    assert option == "dram" and least < 2 * ffn, "its FFN fit the GPU"
    assert make_plan(config, "bfloat16", dram=least, work=WORK, **budgets).count("gpu") >= 3
    with pytest.raises(BudgetError):
        make_plan(config, "bfloat16", dram=least - 1, work=WORK, **budgets)

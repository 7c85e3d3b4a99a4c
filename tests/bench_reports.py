"""Reports of machines that were never measured, for tests of what is made of them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest

from mhaffn.bench import derive
from mhaffn.bench.passes import split_plan, whole_plan
from mhaffn.config import KINDS
from mhaffn.samples import values
from mhaffn.shapes import SHAPES

SEED_MS = {
    "compute.prefill.mha": 152.42, "compute.prefill.ffn": 25.94, "compute.prefill.layer": 172.92,
    "compute.decode.mha": 0.68, "compute.decode.ffn": 1.57, "compute.decode.layer": 2.45,
    "h2d.mha": 6.74, "h2d.ffn": 13.54, "h2d.layer": 20.32,
    "ssd.mha": 64.23, "ssd.ffn": 129.01, "ssd.layer": 189.79, "ssd.row": 193.24,
    "pass.prefill.split": 197.0, "pass.decode.split": 195.0, "pass.prefill.whole": 210.0, "pass.decode.whole": 201.0,
    "roof.memory": 900e9, "roof.matmul": 110e12, "roof.h2d": 46e9, "roof.ssd": 4.9e9,
}  # fmt: skip


def report_of(
    medians: Mapping[str, float] = SEED_MS,
    *,
    spread: float = 0.004,
    rounds: int = 12,
    machine: str = "RTX 5080",
    outlook: bool = True,
) -> dict[str, Any]:
    """What ``mhaffn bench`` would write on a machine with these times; ``spread`` is the swing between rounds.

    Without ``outlook`` it does not say what to change: that takes plans of 80 layers, and seconds.
    """
    return copy.deepcopy(_report_of(tuple(medians.items()), spread, rounds, machine, outlook))


@cache
def _report_of(
    medians: tuple[tuple[str, float], ...], spread: float, rounds: int, machine: str, outlook: bool
) -> dict[str, Any]:
    measured = {
        name: [[value * (1 + spread * ((i * 7 + 3 * j) % 11 - 5) / 5) for j in range(3)] for i in range(rounds)]
        for name, value in medians
    }
    config = SHAPES["seed"]
    facts = derive.Facts("seed", config, 2048, 4, gpu=15 << 30, dram=64 << 30, copies=True)
    plan = split_plan(config, 2048, True, 2)
    whole = whole_plan(config, plan)
    settings = {
        "shape": "seed", "quick": False, "seconds": 90.0, "tokens": 2048, "streamed_layers": 4, "rounds": rounds,
        "gpu_bytes": facts.gpu, "dram_bytes": facts.dram, "device": "cuda",
    }  # fmt: skip
    about = {
        "cpu": "a processor", "cores": 16, "memory_gib": 64.0, "kernel": "6.1", "python": "3.11",
        "gpu": {"name": machine, "memory_gib": 15.5, "cuda": "13.0"}, "versions": {"torch": "2.13.0"},
        "mhaffn": "0.1.0", "commit": "abc1234", "date": "2026-01-01T00:00:00+00:00",
        "disk": {"device": "/dev/nvme0n1", "file_system": "ext4", "model": "an SSD"},
    }  # fmt: skip
    found = values(measured)
    changes = derive.outlook(facts, found)[0] if outlook else {}
    return {
        "format": 1, "machine": about, "reader": {"engine": "io_uring", "direct": "on", "reasons": []},
        "settings": settings, "config": asdict(config),
        "weights": {k: {"parameters": derive.by_kind(config, k), "bytes": facts.nbytes(k)} for k in KINDS},
        "memory": {"peak": {"gpu": 5 << 30, "dram": 5 << 30}, "needed": {"gpu": 6 << 30, "dram": 6 << 30}},
        "rings": {
            name: {"prefetch": p.prefetch, "staging_bytes": p.staging_bytes, "slot_bytes": p.slot_bytes}
            for name, p in (("split", plan), ("whole", whole))
        },
        "left_out": [], "measured": measured, "derived": derive.derived_figures(facts, measured),
        "predicted_ms": derive.predicted_ms(facts, found, split_plan_of(facts)), "outlook": changes,
        "timelines": {phase: _timeline(found, phase) for phase in ("prefill", "decode")},
    }  # fmt: skip


def split_plan_of(facts: derive.Facts) -> Any:
    from dataclasses import replace

    return split_plan(replace(facts.config, num_layers=facts.streamed_layers), facts.tokens, True, 2)


def _timeline(found: Mapping[str, float], phase: str) -> dict[str, Any]:
    spans: list[list[Any]] = []
    ssd = compute = 0.0
    for layer in range(4):
        for kind in KINDS:
            ssd += found[f"ssd.{kind}"]
            copied = ssd - found[f"ssd.{kind}"] / 4
            compute = max(compute, ssd) + found[f"compute.{phase}.{kind}"]
            start = compute - found[f"compute.{phase}.{kind}"]
            spans += [
                ["ssd", f"{layer}.{kind}", ssd - found[f"ssd.{kind}"], ssd],
                ["h2d", f"{layer}.{kind}", copied, copied + found[f"h2d.{kind}"]],
                [kind, f"{layer}.{kind}", start, compute],
            ]
    return {"window_ms": compute, "spans": spans}


def check_derived(raw: Mapping[str, Any]) -> None:
    """Every figure of a report.json and its interval, recomputed here from the samples by hand."""
    measured = raw["measured"]
    each = {name: [typical(name, samples) for samples in rounds] for name, rounds in measured.items()}
    whole = by_hand(raw, {name: typical(name, values) for name, values in each.items()})
    rounds = min(map(len, measured.values()))
    by_round = [by_hand(raw, {name: values[i] for name, values in each.items()}) for i in range(rounds)]
    assert raw["derived"].keys() == whole.keys()
    for name, value in whole.items():
        inner = sorted(found[name] for found in by_round)[rounds // 6 : rounds - rounds // 6]
        margin = 0.02 * abs(value)
        expected = {"value": value, "low": min(inner[0], value - margin), "high": max(inner[-1], value + margin)}
        assert raw["derived"][name] == pytest.approx(expected), name
    check_forecasts(raw, whole)


def by_hand(raw: Mapping[str, Any], of: Mapping[str, float]) -> dict[str, float]:
    """The derived figures of one value a measurement."""
    c = raw["config"]
    D, F, HQ, H, K = (c[name] for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"))
    T = raw["settings"]["tokens"]
    nbytes = {"mha": 2 * (2 * D * HQ * K + 2 * D * H * K + D), "ffn": 2 * (3 * D * F + D)}
    assert {kind: held["bytes"] for kind, held in raw["weights"].items()} == nbytes
    assert {kind: held["parameters"] * 2 for kind, held in raw["weights"].items()} == nbytes
    ssd = {kind: of[f"ssd.{kind}"] for kind in nbytes}
    copies = {kind: of.get(f"h2d.{kind}", 0.0) for kind in nbytes}
    io = {kind: ssd[kind] + copies[kind] for kind in nbytes}
    weights = nbytes | {"layer": sum(nbytes.values())}
    read = nbytes | {"mha": nbytes["mha"] + 2 * T * 2 * H * K}  # and a token's keys and values, in bf16
    flops = {"decode": dict(nbytes), "prefill": {kind: T * size for kind, size in nbytes.items()}}
    flops["decode"]["mha"] += 4 * T * HQ * K
    flops["prefill"]["mha"] += 2 * T * T * HQ * K  # half of all pairs are seen
    for part in (*flops.values(), read):
        part["layer"] = part["mha"] + part["ffn"]
    found: dict[str, float] = {}
    for phase in ("prefill", "decode"):
        compute = {kind: of[f"compute.{phase}.{kind}"] for kind in nbytes}
        total, serial = sum(compute.values()), sum(compute.values()) + sum(io.values())
        bound, ideal = max(total, of["ssd.row"], sum(copies.values())), sum(max(compute[k], io[k]) for k in nbytes)
        here = {
            "compute": total, "serial": serial, "bound": bound, "bound_speedup": serial / bound, "ideal": ideal,
            "ideal_speedup": serial / ideal, "ssd_wanted": weights["layer"] / max(total, sum(copies.values())) * 1e3,
        }  # fmt: skip
        for kind in nbytes:
            here |= {
                f"share.{kind}": compute[kind] / total, f"io.{kind}": io[kind],
                f"bound.{kind}": max(compute[kind], io[kind]), f"wait.{kind}": max(0.0, io[kind] - compute[kind]),
                f"prefetch.{kind}": round(io[kind] / compute[kind]),
                f"serial_share.compute.{kind}": compute[kind] / serial,
                f"serial_share.ssd.{kind}": ssd[kind] / serial, f"serial_share.h2d.{kind}": copies[kind] / serial,
            }  # fmt: skip
        for part, count in flops[phase].items():
            seconds = of[f"compute.{phase}.{part}"] / 1e3
            here |= {f"flop_rate.{part}": count / seconds, f"roof.matmul.{part}": count / seconds / of["roof.matmul"]}
            if phase == "decode":
                rate = read[part] / seconds
                here |= {f"read_rate.{part}": rate, f"roof.memory.{part}": rate / of["roof.memory"]}
        for how in ("split", "whole"):
            if executed := of.get(f"pass.{phase}.{how}"):
                here |= {
                    f"executed.{how}": executed, f"reached.{how}": bound / executed,
                    f"executed_speedup.{how}": serial / executed,
                }  # fmt: skip
        found |= {f"{phase}.{name}": value for name, value in here.items()}
    for part, size in weights.items():
        found[f"ratio.{part}"] = of[f"compute.prefill.{part}"] / of[f"compute.decode.{part}"]
        for link in ("ssd", "h2d"):
            if ms := of.get(f"{link}.{part}"):
                rate = size / ms * 1e3
                found |= {f"rate.{link}.{part}": rate, f"roof.{link}.{part}": rate / of[f"roof.{link}"]}
    row = weights["layer"] / of["ssd.row"] * 1e3
    found |= {"rate.ssd.row": row, "roof.ssd.row": row / of["roof.ssd"]}
    for name in ("compute.prefill", "compute.decode", "ssd", "h2d"):
        if f"{name}.layer" in of:
            split = sum(of[f"{name}.{kind}"] for kind in nbytes)
            found |= {f"split.{name}": split, f"split_minus_whole.{name}": split - of[f"{name}.layer"]}
    return found


def check_forecasts(raw: Mapping[str, Any], whole: Mapping[str, float]) -> None:
    """No simulated pass is faster than its links, nor, with all on SSD, much slower; gains are ratios of seconds."""
    layers = raw["config"]["num_layers"]
    for phase in ("prefill", "decode"):
        bound = whole[f"{phase}.bound"]
        as_it_is = raw["outlook"]["ssd"][0]
        for ms in (raw["predicted_ms"][phase], as_it_is["seconds"][phase] * 1e3 / layers):
            assert 0.999 * bound < ms < 1.1 * bound
        for rows in raw["outlook"].values():
            for row in rows:
                assert row["gain"][phase] == pytest.approx(rows[0]["seconds"][phase] / row["seconds"][phase])
                assert sum(row["tiers"].values()) == 2 * layers


def typical(name: str, samples: Sequence[float]) -> float:
    return max(samples) if name.startswith("roof.") else statistics.median(samples)

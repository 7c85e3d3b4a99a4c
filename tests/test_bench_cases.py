"""Benches under pytest-benchmark: what they record, what they refuse to time, and what they skip."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import timer

    monkeypatch.setattr(timer, "measure_roofs", lambda device: dict.fromkeys(ROOFS, 1e12))
    return timer


ROOFS = ("read_bytes_per_s", "copy_bytes_per_s", "bf16_flop_per_s")


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def missing(x: torch.Tensor) -> torch.Tensor:
    import gemlite.nowhere  # type: ignore[import-not-found,unused-ignore]

    return gemlite.nowhere.double(x)  # type: ignore[no-any-return]


def slowed(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.003)
    return 2 * x


def run(timer: Any, **peers: Callable[..., torch.Tensor]) -> dict[str, Any]:
    case = timer.Case(
        "double", peers, lambda: [(torch.ones(64) + i,) for i in range(4)], double, bytes_moved=512, flops=64
    )
    found: dict[str, Any] = timer.Bench("test", torch.device("cpu")).run(case)
    return found


def test_a_wrong_result_is_not_timed(timer: Any) -> None:
    (right, samples), (wrong, none) = run(timer, right=double, wrong=lambda x: 3 * x).values()
    assert right["relative_error"] == 0 and len(samples) == timer.SAMPLES and min(samples) > 0
    assert "relative error 5.00e-01" in wrong["failed"] and none == () and "median_ms" not in wrong
    assert right["bytes_per_s"] == pytest.approx(512 / right["median_ms"] * 1e3)
    assert right["share_of_roof"] == pytest.approx(right["bytes_per_s"] / 1e12)
    assert right["flop_per_s"] == pytest.approx(64 / right["median_ms"] * 1e3)


def test_a_peer_that_is_not_installed_is_named_with_its_command(timer: Any) -> None:
    entry, samples = run(timer, gemlite=missing)["gemlite"]
    assert entry["failed"] == "not here: pip install gemlite" and samples == ()


def test_a_slowed_implementation_shows(timer: Any) -> None:
    found = run(timer, plain=double, slowed=slowed)
    assert found["slowed"][0]["median_ms"] > 3 > 2 * found["plain"][0]["median_ms"]


@pytest.mark.slow
def test_a_run_under_pytest_benchmark_records_where_how_and_how_near(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_norm_rope.py", "-m", "not gpu", "-k", "rms_norm and 64"]
    subprocess.run([*command, "-q", "--benchmark-only", f"--benchmark-json={out}"], cwd=ROOT, check=True)
    found = json.loads(out.read_text())
    assert found["machine_info"]["mhaffn"]["versions"]["torch"] == torch.__version__
    cases = {row["params"]["case"] for row in found["benchmarks"]}
    assert cases == {"rms_norm tiny T=64", "add_rms_norm tiny T=64"}
    for row in found["benchmarks"]:
        extra = row["extra_info"]
        assert row["stats"]["rounds"] == 20 and extra["relative_error"] <= 2e-2 and "commit" in extra
        assert row["stats"]["median"] * 1e3 == pytest.approx(extra["median_ms"], rel=0.2)  # of an even number
        rate = {"rms_norm tiny T=64": 4, "add_rms_norm tiny T=64": 8}[row["params"]["case"]] * 64 * 256
        assert extra["share_of_roof"] == pytest.approx(
            rate / extra["median_ms"] * 1e3 / extra["roofs"]["copy_bytes_per_s"]
        )


def test_results_of_a_part_take_the_places_of_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import merge_results

    def run(cpu: str, **rows: float) -> dict[str, object]:
        machine = {"mhaffn": {"cpu": cpu, "cores": 2, "gpu": None}}
        return {"machine_info": machine, "benchmarks": [{"fullname": n, "median": s} for n, s in rows.items()]}

    both = merge_results.merged(run("A", b=2.5, c=4.0), run("A", a=1.0, b=2.0))
    assert both["benchmarks"] == run("A", a=1.0, b=2.5, c=4.0)["benchmarks"]
    with pytest.raises(ValueError, match=r"got results of \('B'"):
        merge_results.merged(run("B", b=1.0), run("A", a=1.0))

    target, empty = tmp_path / "results.json", tmp_path / "empty.json"
    target.write_text(json.dumps(run("A", a=1.0)), encoding="utf-8")
    empty.touch()  # a run that was stopped before its first row
    assert subprocess.run([sys.executable, merge_results.__file__, empty, target]).returncode == 1
    assert json.loads(target.read_text(encoding="utf-8")) == run("A", a=1.0)

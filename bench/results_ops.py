"""Operations beside the best other implementation, read from the files under bench/results, whichever bench wrote them.

Two kinds of file: those of the scripts (``--out``), and of pytest-benchmark (``--benchmark-json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = ("mhaffn", "ours")
PARTS = ("Triton", "CUDA", "Gluon", "ops,", "decode kernel", "prefill kernel", "three cuBLAS products")
"""Kernels of our own that are listed by themselves, and what is no implementation: no peers."""


@dataclass(frozen=True)
class Timed:
    """One implementation of one case. ``share`` is that of the roof that binds it, where a roof was measured."""

    machine: str
    case: str
    implementation: str
    ms: float
    share: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Ours beside the fastest other; ``best`` None where there is no other."""

    ours: Timed
    best: Timed | None


def comparisons(folder: Path) -> list[Comparison]:
    """Every case that a file in ``folder`` has ours of; a later file's figures take the place of an earlier one's."""
    found: dict[tuple[str, str], dict[str, Timed]] = {}
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        for key, peers in _by_case(_timed(values)).items():
            found[key] = peers
    return [comparison for peers in found.values() if (comparison := _compare(peers)) is not None]


def _by_case(rows: Iterator[Timed]) -> dict[tuple[str, str], dict[str, Timed]]:
    found: dict[tuple[str, str], dict[str, Timed]] = {}
    for row in rows:
        found.setdefault((row.machine, row.case), {})[row.implementation] = row
    return found


def _compare(peers: Mapping[str, Timed]) -> Comparison | None:
    ours = [row for name, row in peers.items() if name.startswith(OURS)]
    others = [row for name, row in peers.items() if not name.startswith((*OURS, *PARTS))]
    if not ours:
        return None
    return Comparison(min(ours, key=lambda row: row.ms), min(others, key=lambda row: row.ms, default=None))


def _timed(values: Mapping[str, Any]) -> Iterator[Timed]:
    if "benchmarks" in values:
        yield from _of_pytest(values)
    elif values.get("bench") == "generate":
        yield from _of_generate(values)
    elif "bench" in values:
        for row in values["rows"]:
            if "median_ms" in row:
                machine = machine_name(values["environment"])
                yield Timed(machine, row["shape"], row["implementation"], row["median_ms"], _share(row))


def _of_pytest(values: Mapping[str, Any]) -> Iterator[Timed]:
    machine = machine_name(values["machine_info"].get("mhaffn", {}))
    for row in values["benchmarks"]:
        params, extra = row["params"] or {}, row["extra_info"]
        if "peer" in params:
            case = " ".join(str(params[name]) for name in ("shape", "width", "case") if name in params)
            yield Timed(machine, case, params["peer"], row["stats"]["median"] * 1e3, _share(extra))


def _of_generate(values: Mapping[str, Any]) -> Iterator[Timed]:
    for row in values["rows"]:
        for phase in ("prefill", "step", "generate"):
            machine, case = machine_name(values["environment"]), f"{values['width']} {phase}"
            yield Timed(machine, case, row["implementation"], row[phase]["median_ms"])


def _share(row: Mapping[str, Any]) -> float | None:
    share: float | None = row.get("share_of_roof", row.get("share_of_matmul"))
    return share


def machine_name(about: Mapping[str, Any]) -> str:
    """The GPU, or how many cores there are."""
    gpu = about.get("gpu")
    name = gpu["name"] if isinstance(gpu, dict) else gpu
    if name:
        return str(name).removeprefix("NVIDIA ").removesuffix(" HBM3")
    return f"{about.get('cores', '?')}-core CPU"

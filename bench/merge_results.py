"""Puts the rows of a run of pytest-benchmark into the machine's file of results, in the places of earlier ones.

python bench/merge_results.py NEW FILE     FILE need not be there yet; rows that NEW has not are kept

So one subject can be measured again (``make bench-gpu ONLY=bench/bench_attention.py``). Each row's ``extra_info`` has
its own commit, versions and clocks; what stands at the head of the file is of the newest run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def merged(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The rows of both in the old order, new ones last; by name, ``new`` counts.

    Raises :class:`ValueError` where the two are of different machines.
    """
    machines = [_machine(values) for values in (new, old)]
    if machines[0] != machines[1]:
        raise ValueError(f"got results of {machines[0]}, expected {machines[1]}, which the file is of")
    rows = {row["fullname"]: row for values in (old, new) for row in values["benchmarks"]}
    return new | {"benchmarks": list(rows.values())}


def _machine(values: dict[str, Any]) -> tuple[Any, ...]:
    about = values["machine_info"]["mhaffn"]
    return about["cpu"], about["cores"], (about["gpu"] or {}).get("name")


def main() -> int:
    fresh, target = map(Path, sys.argv[1:])
    if not fresh.exists() or not fresh.stat().st_size:
        print(f"{fresh} has no results: {target} stays as it is")
        return 1
    values = json.loads(fresh.read_text(encoding="utf-8"))
    if target.exists():
        values = merged(values, json.loads(target.read_text(encoding="utf-8")))
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
    partial.replace(target)
    print(f"{len(values['benchmarks'])} rows in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

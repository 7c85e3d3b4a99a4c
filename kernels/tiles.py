"""Tile tables: which block sizes a kernel runs with, per GPU architecture, as data under ``configs/``.

A table maps a kernel to rules, tried in order: the first whose every ``max`` bound holds gives the tile. Nothing is
tuned on a user's first call; ``python -m mhaffn.kernels.tune`` writes the tables on the machine it tunes for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

CONFIGS = Path(__file__).parent / "configs"
SHARED_MEMORY_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_120": 101_376}
"""Bytes of shared memory a block may use, by architecture."""

Tile = dict[str, int]
Table = dict[str, list[dict[str, dict[str, int]]]]


@dataclass(frozen=True)
class Machine:
    """What a launcher needs to know of a device: its table, its processors, and whether launches may overlap
    (programmatic dependent launch: a kernel starts while its predecessor drains)."""

    arch: str
    processors: int
    overlap: bool
    gluon: bool = False
    """Whether kernels written for this one architecture run: sm_90's warp groups."""


INTERPRETER = Machine("sm_90", 4, overlap=False)  # CPU tensors: Triton's interpreter


@cache
def gpu(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    if properties.major >= 12:
        arch = "sm_120"
    elif properties.major >= 9:
        arch = "sm_90"
    else:
        arch = "sm_80" if properties.minor == 0 else "sm_89"  # 8.6 and 8.9 share one limit of shared memory
    return Machine(arch, properties.multi_processor_count, overlap=properties.major >= 9, gluon=properties.major == 9)


def machine(device: torch.device) -> Machine:
    if device.type == "cpu":
        return INTERPRETER
    return gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def table(name: str) -> Table:
    rules: Table = json.loads((CONFIGS / f"{name}.json").read_text())
    return rules


def tile(kernel: str, arch: str, **sizes: int) -> Tile:
    """The tile of ``kernel`` on ``arch`` for these sizes (``element`` bytes, ``dim``, ``per_processor`` rows …)."""
    try:
        return match(table(arch)[kernel], sizes)
    except LookupError:
        raise LookupError(f"configs/{arch}.json has no tile of {kernel} for {sizes}") from None


def match(rules: list[dict[str, dict[str, int]]], sizes: dict[str, int]) -> Tile:
    """The tile of the first rule whose bounds hold."""
    for rule in rules:
        if all(sizes[name] <= bound for name, bound in rule["max"].items()):
            return rule["tile"]
    raise LookupError(f"no rule for {sizes}")


def write(name: str, rules: Table) -> None:
    """Writes a table, one rule a line."""
    kernels = []
    for kernel, entries in rules.items():
        lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
        kernels.append(f'  "{kernel}": [\n{lines}\n  ]' if entries else f'  "{kernel}": []')
    (CONFIGS / f"{name}.json").write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    table.cache_clear()

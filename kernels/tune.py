"""Offline tuner: tries tiles on this machine's GPU and writes the fastest into its architecture's table.

::

    python -m mhaffn.kernels.tune                     # everything; a few minutes
    python -m mhaffn.kernels.tune --only few_rows     # kernels whose name starts so
    python -m mhaffn.kernels.tune --compile 3/8       # compile every eighth candidate into the caches, time nothing

Run several ``--compile i/n`` at once first and the timing run finds everything compiled. Users' calls never tune.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quantized import Quantized
from . import (
    attention_decode,
    attention_prefill,
    ffn,
    library,
    nvrtc,
    nvrtc_attention,
    nvrtc_quantized,
    quantized,
    tiles,
    timing,
)

DTYPE = torch.bfloat16
COLD_BYTES = 200 << 20  # inputs of consecutive calls: more than any L2
DECODE_CALLS_MIN = 16  # in one graph: two alone would bear its start, and show little of launches that overlap
PREFILL_TILES = [
    (128, 128, 2, 8),
    (128, 128, 3, 8),
    (128, 64, 2, 8),
    (128, 64, 3, 8),
    (128, 64, 3, 4),
    (64, 128, 2, 4),
    (64, 64, 3, 4),
    (64, 64, 2, 4),
    (64, 128, 2, 8),
]
GATE_UP_TILES = [
    (128, 128, 64, 8, 4, 8),
    (128, 128, 64, 16, 3, 8),
    (128, 128, 64, 8, 3, 8),
    (256, 64, 64, 8, 4, 8),
    (128, 128, 32, 8, 6, 8),
    (256, 128, 64, 8, 2, 8),
]
CUDA_TILES = [
    (1, 8, 2, 2),
    (1, 8, 1, 3),
    (1, 8, 1, 4),
    (1, 4, 2, 4),
    (1, 4, 1, 6),
    (1, 16, 2, 1),
    (1, 8, 4, 2),
    (1, 4, 4, 4),
    (2, 8, 1, 2),
    (2, 4, 1, 4),
    (2, 8, 2, 2),
]
DECODE_CUDA_TILES = [
    (8, 1, 2, 1),
    (8, 1, 2, 2),
    (8, 2, 1, 1),
    (8, 2, 1, 2),
    (4, 2, 2, 1),
    (4, 4, 1, 1),
    (16, 1, 1, 0),
]
FEW_BITS_TILES = [
    (32, 128, 4, 4),
    (64, 128, 3, 4),
    (128, 128, 3, 4),
    (128, 128, 3, 8),
    (256, 128, 3, 8),
]
FEW_BITS_CUDA_TILES = [
    (1, 4, 2, 3),
    (1, 4, 2, 4),
    (1, 4, 1, 6),
    (1, 8, 1, 2),
    (1, 8, 1, 3),
    (2, 4, 1, 2),
    (2, 4, 1, 4),
    (2, 8, 1, 1),
    (2, 8, 1, 2),
    (4, 2, 1, 4),
    (4, 4, 1, 2),
]
FEW_BITS_SM90_TILES = [
    (64, 8, 2),
    (64, 8, 4),
    (128, 8, 2),
    (128, 8, 4),
    (256, 4, 1),
    (256, 4, 2),
    (256, 5, 2),
]


@dataclass
class Problem:
    """A rule of a table, its candidate tiles, and calls to time: one list a shape."""

    kernel: str
    max: dict[str, int]
    candidates: list[tiles.Tile]
    shapes: list[Callable[[tiles.Tile], list[timing.Call]]]
    rival: tuple[str, dict[str, int], Callable[[tiles.Tile], list[timing.Call]]] | None = None
    """For a CUDA kernel: its Triton sibling's table, that table's sizes, and its calls; the faster is the default."""


def grid(**choices: tuple[int, ...]) -> Iterator[tiles.Tile]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def named(names: str, tuples: list[tuple[int, ...]]) -> list[tiles.Tile]:
    return [dict(zip(names.split(), values, strict=True)) for values in tuples]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def decode_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tile: tiles.Tile) -> Tensor:
    return attention_decode.attention_decode(q, k, v, True, None, mask, q.shape[-1] ** -0.5, tile)


def decode_cuda(q: Tensor, k: Tensor, v: Tensor, mask: None, tile: tiles.Tile) -> Tensor:
    b, s, h, dim = k.shape
    plan = nvrtc_attention.plan(q.dtype == torch.float16, dim, b * h, s, q.device.index, tile)
    return nvrtc_attention.attention_decode(q, k, v, None, dim**-0.5, plan)


def decode_shape(
    batch: int,
    keys: int,
    dim: int = 128,
    heads: tuple[int, int] = (64, 8),
    tokens: int = 1,
    run: Callable[..., Tensor] = decode_triton,
) -> Callable[..., Any]:
    """One token, or several drafted ones under a mask: a tile of Triton's has to run both."""
    hq, h = heads
    sets: list[tuple[Tensor, Tensor]] = []

    def calls(tile: tiles.Tile) -> list[timing.Call]:
        if not sets:
            count = max(2, COLD_BYTES // (batch * keys * h * dim * 4))
            sets.extend((randn(batch, keys, h, dim), randn(batch, keys, h, dim)) for _ in range(count))
        q = randn(batch, tokens, hq, dim)
        mask = None
        if tokens > 1:
            mask = torch.ones(batch, 1, tokens, keys, dtype=torch.bool, device="cuda")
        once = [lambda k=k, v=v: run(q, k, v, mask, tile) for k, v in sets]
        return once * -(-DECODE_CALLS_MIN // len(once))

    return calls


def prefill_shape(tokens: int, dim: int) -> Callable[..., Any]:
    """A left-padded batch: what this kernel is for where another takes the plain case."""

    def calls(tile: tiles.Tile) -> list[timing.Call]:
        q, k = randn(2, tokens, 8192 // dim, dim), randn(2, tokens, 1024 // dim, dim)
        mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool, device="cuda")
        mask[1, ..., : tokens // 4] = False
        return [lambda: attention_prefill.attention_prefill(q, k, k, True, None, mask, dim**-0.5, tile)]

    return calls


def few_shape(run: Callable[..., Tensor], m: int, rows: int, width: int, gated: bool) -> Callable[..., Any]:
    sets: list[list[Tensor]] = []

    def calls(tile: tiles.Tile) -> list[timing.Call]:
        if not sets:
            count = max(2, COLD_BYTES // (rows * width * 4))
            sets.extend([randn(rows, width) for _ in range(1 + gated)] for _ in range(count))
        x = randn(m, width)
        return [lambda s=s: run(x, s[0], s[1] if gated else None, tile) for s in sets]

    return calls


def gate_up_shape(m: int) -> Callable[..., Any]:
    def calls(tile: tiles.Tile) -> list[timing.Call]:
        x, w1, w3 = randn(m, 8192), randn(28672, 8192), randn(28672, 8192)
        return [lambda: ffn.gate_up(x, w1, w3, tile)]

    return calls


def problems() -> list[Problem]:
    found = []
    decode = list(grid(BLOCK_N=(32, 64, 128), STAGES=(2, 3, 4), WARPS=(4,), WAVES=(1, 2, 3, 4), COMBINE_WARPS=(2,)))
    decode += list(grid(BLOCK_N=(128,), STAGES=(2, 3), WARPS=(8,), WAVES=(1, 2), COMBINE_WARPS=(2,)))
    decode += [{**t, "AHEAD": 128, "START": s} for t in decode if t["BLOCK_N"] >= 64 for s in (0, 1)]
    one = {"element": 2, "dim": 128, "rows": 16, "programs": 32}
    for bound, keys in (({"keys": 4096}, 2048), ({"keys": 16384}, 8192), ({}, 32768)):
        found.append(Problem("attention_decode", {**one, **bound}, decode, [decode_shape(1, keys)]))
    many = {"element": 2, "dim": 128, "rows": 16}
    for bound, shapes in (({"keys": 4096}, (2048,)), ({}, (8192, 32768))):
        calls = [decode_shape(8, keys) for keys in shapes]
        found.append(Problem("attention_decode", {**many, **bound}, decode, calls))
    drafted = {"element": 2, "dim": 128}
    found.append(Problem("attention_decode", drafted, decode, [decode_shape(1, 8192, tokens=n) for n in (4, 16)]))
    small = list(grid(BLOCK_N=(64, 128), STAGES=(2, 3, 4), WARPS=(4,), WAVES=(1, 2, 4), COMBINE_WARPS=(2,)))
    found.append(
        Problem(
            "attention_decode",
            {"element": 2, "dim": 64},
            small,
            [decode_shape(1, 8192, 64, (32, 8)), decode_shape(1, 8192, 64, (32, 8), 16)],
        )
    )
    found += decode_cuda_problems()
    prefill = [
        {**tile, "DESCRIPTOR": d} for tile in named("BLOCK_M BLOCK_N STAGES WARPS", PREFILL_TILES) for d in (0, 1)
    ]
    for dim in (64, 128):
        found.append(Problem("attention_prefill", {"element": 2, "dim": dim}, prefill, [prefill_shape(4096, dim)]))
    gate_up = named("BLOCK_M BLOCK_F BLOCK_D GROUP STAGES WARPS", GATE_UP_TILES)
    found.append(Problem("gate_up", {"element": 2}, gate_up, [gate_up_shape(2048)]))
    found += few_rows_problems()
    found += few_bits_problems()
    return found


def decode_cuda_problems() -> list[Problem]:
    """One token: of a few sequences' heads, then of many; heads of 64, then of 128."""
    found = []
    compiled = named("WARPS BLOCKS DEPTH AHEAD", DECODE_CUDA_TILES)
    launched = list(grid(INTERLEAVED=(0, 1), WAVES=(1, 2)))
    candidates = [{**tile, **launch} for tile in compiled for launch in launched]
    for dim, heads in ((64, (32, 8)), (128, (64, 8))):
        width = {"dim": 64} if dim == 64 else {}
        lengths: list[tuple[dict[str, int], int]] = [({"keys": 16384}, 8192), ({}, 32768)]
        for batch, programs in ((1, {"programs": 8}), (8, {})):
            for bound, keys in lengths if dim == 128 else [({}, 8192)]:
                sizes = {"element": 2, "dim": dim, "rows": 16, "keys": keys, "programs": batch * heads[1]}
                rival = ("attention_decode", sizes, decode_shape(batch, keys, dim, heads))
                shapes = [decode_shape(batch, keys, dim, heads, run=decode_cuda)]
                limits = {**width, **programs, **bound}
                found.append(Problem("attention_decode_cuda", limits, candidates, shapes, rival))
    return found


def few_rows_problems() -> list[Problem]:
    """70B and 8B widths: [28672, 8192] and [14336, 4096] gated, then the transposes."""
    found = []
    triton_tiles = list(grid(BLOCK_R=(16, 32, 64), BLOCK_D=(128, 256), STAGES=(3, 4), WARPS=(4,)))
    triton_tiles += list(grid(BLOCK_R=(64, 128), BLOCK_D=(64,), STAGES=(4, 5), WARPS=(4,)))
    cuda_tiles = named("TILES WARPS STEPS BLOCKS", CUDA_TILES)
    for gated, shapes in ((True, ((14336, 4096), (28672, 8192))), (False, ((4096, 14336), (8192, 28672)))):
        name = "few_rows_gated" if gated else "few_rows"
        for rows, width in shapes:
            bound = {"per_processor": 40 if rows < 5000 else 70 if rows < 9000 else 120} if rows < 20000 else {}
            few = [few_shape(ffn.few_rows, m, rows, width, gated) for m in (1, 16)]
            found.append(Problem(name, {"element": 2, "rows": 16, **bound}, triton_tiles, few))
            if rows in (28672, 8192):
                few = [few_shape(ffn.few_rows, 64, rows, width, gated)]
                found.append(Problem(name, {"element": 2, **bound}, triton_tiles, few))
            for columns, m in ((1, 1), (2, 16)):
                few = [few_shape(nvrtc.few_rows, m, rows, width, gated)]
                name_cuda = name.replace("few_rows", "few_rows_cuda")
                sizes = {"element": 2, "rows": 16, "per_processor": bound.get("per_processor", 1 << 20)}
                rival = (name, sizes, few_shape(ffn.few_rows, m, rows, width, gated))
                found.append(Problem(name_cuda, {"columns": columns, **bound}, cuda_tiles, few, rival))
    return found


def few_bits(bits: int, rows: int, width: int) -> Quantized:
    """Random int4 by groups of 128, or int8 by rows."""
    values = torch.randint(0, 256, (rows, width * bits // 8), device="cuda", dtype=torch.uint8)
    group = 128 if bits == 4 else width
    scales = torch.full((rows, width // group), 0.01, device="cuda", dtype=DTYPE)
    return Quantized("int4" if bits == 4 else "int8", values.view(values.dtype if bits == 4 else torch.int8), scales,
                     None, group)  # fmt: skip


def few_bits_shape(
    run: Callable[..., Tensor], m: int, bits: int, rows: int, width: int, gated: bool = False
) -> Callable[..., Any]:
    """``run(x, a, b or None, tile)`` on weights that the cache does not hold together."""
    sets: list[tuple[Quantized, Quantized | None]] = []

    def calls(tile: tiles.Tile) -> list[timing.Call]:
        if not sets:
            count = max(2, COLD_BYTES * 8 // (rows * width * bits * (1 + gated)))
            new = lambda: few_bits(bits, rows, width)  # noqa: E731
            sets.extend((new(), new() if gated else None) for _ in range(count))
        x = randn(m, width)
        once = [lambda s=s: run(x, *s, tile) for s in sets]
        return once * (-(-DECODE_CALLS_MIN // len(once)) if m <= 128 else 1)

    return calls


def few_bits_problems() -> list[Problem]:
    """70B widths: up (and gate), then down; the rules of 4 bits go before those of 8."""
    found = []
    triton_tiles = named("BLOCK_R BLOCK_D STAGES WARPS", FEW_BITS_TILES)
    cuda_tiles = named("TILES WARPS STEPS BLOCKS", FEW_BITS_CUDA_TILES)
    sm90_tiles = named("TOKENS STAGES AHEAD", FEW_BITS_SM90_TILES)
    sm90 = tiles.machine(torch.device("cuda")).gluon

    def many(x: Tensor, a: Quantized, b: None, tile: tiles.Tile) -> Tensor:
        return nvrtc_quantized.many_rows(x, a, tile)

    def chunks(x: Tensor, a: Quantized, b: None, tile: tiles.Tile) -> Tensor:
        return library.linear_in_chunks(x, a, quantized.dequantize)

    for bits, (rows, width) in itertools.product((4, 8), ((8192, 28672), (28672, 8192))):
        bound = ({"bits": 4} if bits == 4 else {}) | ({"per_processor": 70} if rows < 9000 else {})
        shape = (bits, rows, width)
        sizes = {"bits": bits, "per_processor": rows // 132}
        for m in (16, 32, 64, 128):
            few = [few_bits_shape(quantized.linear, m, *shape)]
            found.append(Problem("quantized", {**bound, "rows": m}, triton_tiles, few))
        for gated in (False, True) if rows > width else (False,):
            suffix = "_gated" if gated else ""
            if gated:
                few = [few_bits_shape(quantized.linear, m, *shape, gated) for m in (1, 16)]
                found.append(Problem("quantized_gated", {**bound, "rows": 16}, triton_tiles, few))
            for columns, m in ((1, 1), (2, 16)):
                rival = (
                    f"quantized{suffix}",
                    {**sizes, "rows": 16},
                    few_bits_shape(quantized.linear, m, *shape, gated),
                )
                few = [few_bits_shape(nvrtc_quantized.few_rows, m, *shape, gated)]
                found.append(Problem(f"quantized_cuda{suffix}", {**bound, "columns": columns}, cuda_tiles, few, rival))
        for m in (64, 128, 512, 2048, 8192) if sm90 else ():
            run = quantized.linear if m <= 128 else chunks
            rival = ("quantized", {**sizes, "rows": min(m, 128)}, few_bits_shape(run, m, *shape))
            limit = {"rows": m} if m <= 2048 else {}
            found.append(
                Problem("quantized_sm90", {**bound, **limit}, sm90_tiles, [few_bits_shape(many, m, *shape)], rival)
            )
    if sm90:  # keys and values of many tokens
        shape = (4, 1024, 8192)
        rival = ("quantized", {"bits": 4, "per_processor": 7, "rows": 128}, few_bits_shape(chunks, 2048, *shape))
        few = [few_bits_shape(many, 2048, *shape)]
        found.append(Problem("quantized_sm90", {"per_processor": 8}, sm90_tiles, few, rival))
    return found


def best(problem: Problem) -> tuple[tiles.Tile | None, float]:
    """The tile with the lowest product of times over the shapes, and that product; prints every time."""
    winner, lowest = None, math.inf
    for tile in problem.candidates:
        try:
            times = [timing.time_graph(shape(tile), samples=7).median_ms for shape in problem.shapes]
        except Exception as error:  # too much shared memory or too many registers: not a candidate here
            print(json.dumps({"kernel": problem.kernel, "tile": tile, "failed": str(error)[:80]}), flush=True)
            continue
        print(json.dumps({"kernel": problem.kernel, "max": problem.max, "tile": tile, "ms": times}), flush=True)
        product = math.prod(times)
        if product < lowest:
            winner, lowest = tile, product
    return winner, lowest


def compile_share(share: str, only: str) -> None:
    """Every n-th candidate, compiled by calling it once."""
    index, count = (int(part) for part in share.split("/"))
    work = [(p, tile) for p in problems() if p.kernel.startswith(only) for tile in p.candidates]
    for problem, tile in work[index::count]:
        try:
            for shape in problem.shapes:
                shape(tile)[0]()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{problem.kernel} {tile}: {str(error)[:80]}", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PREFIX")
    parser.add_argument("--compile", default="", metavar="I/N")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.compile:
        compile_share(arguments.compile, arguments.only)
        return
    arch = tiles.machine(torch.device("cuda")).arch
    rules = json.loads(json.dumps(tiles.table(arch)))
    for problem in problems():
        if problem.kernel.startswith(arguments.only):
            tile, lowest = best(problem)
            torch.cuda.empty_cache()
            if tile is None:
                continue
            if problem.rival is not None:
                kernel, sizes, calls = problem.rival
                theirs = timing.time_graph(calls(tiles.match(rules[kernel], sizes))).median_ms
                tile = {**tile, "DEFAULT": int(lowest < 0.98 * theirs)}  # a tie goes to Triton: one dependency less
            replace(rules, problem, tile)
    tiles.write(arch, rules)


def replace(rules: tiles.Table, problem: Problem, tile: tiles.Tile) -> None:
    """Puts the tile into the problem's rule; a new rule goes before the first one that is looser."""
    entries = rules.setdefault(problem.kernel, [])
    for entry in entries:
        if entry["max"] == problem.max:
            entry["tile"] = tile
            return
    looser = (i for i, e in enumerate(entries) if all(problem.max.get(n, 1 << 62) <= b for n, b in e["max"].items()))
    entries.insert(next(looser, len(entries)), {"max": problem.max, "tile": tile})


if __name__ == "__main__":
    main()

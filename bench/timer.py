"""What the op benches share: machine facts, roofs measured in the same run, rows of results, one table, one JSON file.

Every bench checks an implementation against the truth first and times it only if it is right. Inputs of consecutive
timed calls lie in different buffers, larger together than L2: the figures are for cold caches.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from mhaffn.kernels import timing

COLD_BYTES = 200 << 20
CALLS_MIN = 16
"""Calls in the graph of a memory-bound row: a graph's start costs 2 µs or 3, which two calls would bear alone."""
PIP_NAMES = {"flash_attn": "--pre flash-attn-4", "gemlite": "gemlite", "liger_kernel": "liger-kernel"}


@triton.jit
def read_kernel(p_x, p_out, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(16):
        total += tl.load(p_x + (tl.program_id(0) * 16 + i).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_out + tl.program_id(0), tl.sum(total, 0))


def measure_roofs() -> dict[str, float]:
    """Bytes a second of a streaming read and of a copy (read plus written), and FLOP/s of a large bf16 product."""
    words = torch.randint(0, 100, (1 << 29,), device="cuda", dtype=torch.int32)
    out = torch.empty(1 << 16, device="cuda", dtype=torch.int32)
    half, other = words.chunk(2)

    def read(block: int) -> None:
        read_kernel[(words.numel() // (16 * block),)](words, out, BLOCK=block, num_warps=8)

    read_ms = min(timing.time_calls(lambda b=b: read(b)).median_ms for b in (2048, 4096, 8192))
    copy_ms = timing.time_calls(lambda: half.copy_(other)).median_ms
    size = words.numel() * words.element_size()
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = timing.time_calls(lambda: a @ b).median_ms
    return {
        "read_bytes_per_s": size / read_ms * 1e3,
        "copy_bytes_per_s": size / copy_ms * 1e3,
        "bf16_flop_per_s": 2 * 8192**3 / product * 1e3,
    }


def environment() -> dict[str, Any]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    names = ("torch", "triton", "cupy-cuda13x", "numpy", "flash-attn-4", "gemlite", "liger-kernel")
    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": {name: installed(name) for name in names},
        "commit": commit if len(commit) == 40 else None,
    }


class Bench:
    """Rows of one bench file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.roofs = measure_roofs()
        self.rows: list[dict[str, Any]] = []

    def compare(
        self,
        shape: str,
        peers: dict[str, Sequence[timing.Call]],
        truth: torch.Tensor | None,
        *,
        bytes_moved: float = 0,
        flops: float = 0,
        tolerance: float = 2e-2,
        samples: int = 20,
        roof: str = "read_bytes_per_s",
    ) -> None:
        """Checks each peer's first call against the truth, then times all of them by turns, in CUDA graphs.

        By turns: clocks fall as the chip warms, and the peer timed first would win.
        """
        graphs: dict[str, timing.Graph] = {}
        entries = {name: {"shape": shape, "implementation": name} for name in peers}
        for name, calls in peers.items():
            try:
                if truth is not None:
                    entries[name]["relative_error"] = self._error(calls[0](), truth, tolerance)
                rounds = -(-CALLS_MIN // len(calls)) if bytes_moved else 1
                graphs[name] = timing.Graph([*calls] * rounds)
            except ModuleNotFoundError as problem:
                package = PIP_NAMES.get((problem.name or "").partition(".")[0])
                entries[name]["failed"] = f"not here: pip install {package}" if package else str(problem)
            except Exception as problem:
                entries[name]["failed"] = f"{type(problem).__name__}: {problem}"[:200]
        times = timing.by_turns(graphs, samples)
        for name, entry in entries.items():
            if name in times:
                entry |= self._figures(times[name], bytes_moved, flops, roof)
            self.rows.append(entry)
            print(_line(entry), flush=True)

    @staticmethod
    def _error(got: Any, truth: torch.Tensor, tolerance: float) -> float:
        got = got[0] if isinstance(got, tuple | list) else got
        error = ((got.float() - truth.float()).norm() / truth.float().norm()).item()
        if not error <= tolerance:
            raise ArithmeticError(f"relative error {error:.2e} over {tolerance:.0e}: not timed")
        return error

    def _figures(self, timed: timing.Timing, bytes_moved: float, flops: float, roof: str) -> dict[str, Any]:
        figures: dict[str, Any] = {"median_ms": timed.median_ms, "p20_ms": timed.p20_ms, "p80_ms": timed.p80_ms}
        if bytes_moved:
            rate = bytes_moved / timed.median_ms * 1e3
            figures |= {"bytes_per_s": rate, "share_of_roof": rate / self.roofs[roof], "roof": roof}
        if flops:
            rate = flops / timed.median_ms * 1e3
            figures |= {"flop_per_s": rate, "share_of_matmul": rate / self.roofs["bf16_flop_per_s"]}
        return figures

    def save(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            report = {"bench": self.name, "environment": environment(), "roofs": self.roofs, "rows": self.rows}
            path.write_text(json.dumps(report, indent=1) + "\n")


def _line(entry: dict[str, Any]) -> str:
    line = f"{entry['shape']:28} {entry['implementation']:26} "
    if "median_ms" not in entry:
        return line + entry.get("failed", "")
    line += f"{entry['median_ms'] * 1e3:9.1f} us"
    if "bytes_per_s" in entry:
        line += f" {entry['bytes_per_s'] / 1e12:5.2f} TB/s {entry['share_of_roof']:4.0%}"
    if "flop_per_s" in entry:
        line += f" {entry['flop_per_s'] / 1e12:4.0f} TFLOP/s"
    return line


def main(name: str, run: Callable[[Bench], None]) -> None:
    parser = argparse.ArgumentParser(description=f"bench {name}")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        bench = Bench(name)
        print({key: f"{value / 1e12:.2f}e12" for key, value in bench.roofs.items()}, flush=True)
        try:
            run(bench)
        finally:
            bench.save(arguments.out)

"""What the op benches share: cases, roofs measured in the same run, rows of results, one table, one JSON file.

Every bench checks an implementation against the truth first and times it only if it is right. Inputs of consecutive
timed calls lie in different buffers, larger together than L2: the figures are for cold caches. The implementations of
a case are timed by turns, each sample the device time of one round of calls by CUDA events (on a CPU, the clock's).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mhaffn import roofs
from mhaffn.kernels import timing
from mhaffn.machine import describe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLD_BYTES = 200 << 20
CALLS_MIN = 16
"""Calls in the graph of a memory-bound row: a graph's start costs 2 µs or 3, which two calls would bear alone."""
SAMPLES = 20
PIP_NAMES = {"flash_attn": "--pre flash-attn-4", "gemlite": "gemlite", "liger_kernel": "liger-kernel"}
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One shape of one operation.

    ``peers`` are the implementations; ``inputs`` makes the arguments of consecutive calls, enough of them that no
    cache holds them all; ``truth`` is the right result of the first (None: nothing is checked), which an
    implementation must meet within a relative error of ``tolerance``. ``small`` runs on a CPU too.
    """

    name: str
    peers: Mapping[str, Callable[..., Any]]
    inputs: Callable[[], Sequence[Inputs]]
    truth: Callable[..., torch.Tensor] | None
    bytes_moved: float = 0
    flops: float = 0
    roof: str = "read_bytes_per_s"
    tolerance: float = 2e-2
    small: bool = False


def by_name(cases: Iterable[Case]) -> dict[str, Case]:
    return {case.name: case for case in cases}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def measure_roofs(device: torch.device) -> dict[str, float]:
    """Bytes a second of a streaming read and of a copy (read plus written), and FLOP/s of a large bf16 product."""
    cuda = device.type == "cuda"
    nbytes = (2 << 30) if cuda else 256 << 20
    half, other = torch.randint(0, 100, (2, nbytes // 8), device=device, dtype=torch.int32)
    samplers: dict[str, roofs.Sampler] = {
        "read_bytes_per_s": roofs.memory_read(device, nbytes),
        "copy_bytes_per_s": lambda: nbytes / roofs.seconds_queued(device, lambda: half.copy_(other)),
        "bf16_flop_per_s": roofs.matmul(device, torch.bfloat16, 8192 if cuda else 1024),
    }
    return {name: statistics.median(roofs.measure(sampler, 0.2)) for name, sampler in samplers.items()}


def environment() -> dict[str, Any]:
    """The machine, its clocks now, and versions of what is compared."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    about = describe()
    peers = {name: installed(name) for name in ("flash-attn-4", "gemlite", "liger-kernel", "torchao")}
    versions = {**about["versions"], "cudnn": torch.backends.cudnn.version(), **peers}  # type: ignore[dict-item]
    return about | {"versions": {name: found for name, found in versions.items() if found}, "clocks": clocks()}


def clocks() -> dict[str, str]:
    """Clocks of the GPU now, as nvidia-smi tells them."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    try:
        number = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # nvidia-smi counts hidden ones too
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={number}"]
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (value.strip() for value in line.split(",")), strict=False))


class Bench:
    """Rows of one bench file."""

    def __init__(self, name: str, device: torch.device = DEVICE) -> None:
        self.name, self.device = name, device
        self.roofs = measure_roofs(device)
        self.rows: list[dict[str, Any]] = []

    def run(self, case: Case) -> dict[str, tuple[dict[str, Any], tuple[float, ...]]]:
        """Makes the inputs, and compares; by peer its row and its samples in milliseconds."""
        torch._dynamo.reset()  # else peers that compile soon reach its limit of shapes
        sets = case.inputs()
        calls = {name: [_call(peer, inputs) for inputs in sets] for name, peer in case.peers.items()}
        return self.compare(
            case.name, calls, case.truth(*sets[0]) if case.truth else None,
            bytes_moved=case.bytes_moved, flops=case.flops, tolerance=case.tolerance, roof=case.roof,
        )  # fmt: skip

    def compare(
        self,
        shape: str,
        peers: Mapping[str, Sequence[timing.Call]],
        truth: torch.Tensor | None,
        *,
        bytes_moved: float = 0,
        flops: float = 0,
        tolerance: float = 2e-2,
        samples: int = SAMPLES,
        roof: str = "read_bytes_per_s",
    ) -> dict[str, tuple[dict[str, Any], tuple[float, ...]]]:
        """Checks each peer's first call against the truth, then times all of them by turns, in CUDA graphs.

        By turns: clocks fall as the chip warms, and the peer timed first would win.
        """
        ready: dict[str, list[timing.Call]] = {}
        entries: dict[str, dict[str, Any]] = {name: {"shape": shape, "implementation": name} for name in peers}
        graphs: dict[str, timing.Graph] = {}
        for name, calls in peers.items():
            try:
                if truth is not None:
                    entries[name]["relative_error"] = self._error(calls[0](), truth, tolerance)
                ready[name] = [*calls] * (-(-CALLS_MIN // len(calls)) if bytes_moved else 1)
                if self.device.type == "cuda":
                    graphs[name] = timing.Graph(ready[name])
            except ModuleNotFoundError as problem:
                package = PIP_NAMES.get((problem.name or "").partition(".")[0])
                entries[name]["failed"] = f"not here: pip install {package}" if package else str(problem)
            except NotImplementedError as problem:
                entries[name]["failed"] = f"not here: {problem}"
            except Exception as problem:
                entries[name]["failed"] = f"{type(problem).__name__}: {problem}"[:200]
        times = timing.by_turns(graphs, samples) if self.device.type == "cuda" else by_turns(ready, samples)
        for name, entry in entries.items():
            if name in times:
                entry |= self._figures(times[name], bytes_moved, flops, roof)
            self.rows.append(entry)
            print(_line(entry), flush=True)
        return {name: (entry, times[name].samples_ms if name in times else ()) for name, entry in entries.items()}

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


def _call(peer: Callable[..., Any], inputs: Inputs) -> timing.Call:
    return lambda: peer(*inputs)


def by_turns(peers: Mapping[str, Sequence[timing.Call]], samples: int) -> dict[str, timing.Timing]:
    """Milliseconds a call by the clock, in alternation, a round that does not count first."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(samples + 1):
        for name, calls in peers.items():
            started = time.perf_counter()
            for call in calls:
                call()
            found[name].append((time.perf_counter() - started) * 1e3 / len(calls))
    return {name: timing.summary(times[1:]) for name, times in found.items()}


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


def main_cases(name: str, cases: Mapping[str, Case]) -> None:
    """The cases by turns, as a script: on a CPU the small ones."""

    def run(bench: Bench) -> None:
        for case in cases.values():
            if case.small or bench.device.type == "cuda":
                bench.run(case)

    main(name, run)

"""Compiles kernels for GPUs that are not here: launchers run on CPU tensors, launches become compilations.

A process that did this cannot use Triton's interpreter, nor a GPU: tests run it as a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from weights import random_weight

from mhaffn.kernels import (
    attention_decode,
    attention_prefill,
    attention_prefill_sm90,
    ffn,
    quantized,
    rmsnorm,
    rope,
    tiles,
)

QUANTIZED = [("int4", 128, False), ("int4", 32, True), ("int8", 1024, False), ("fp8", 1024, False)]
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_120": 84}


@dataclass
class Compiled:
    """One compiled kernel and what it needs."""

    name: str
    shared: int
    spills: int
    ptx: str


class AbsentGPU:
    """The active driver, as far as compilation asks for it."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def spilled_bytes(cubin: bytes) -> int:
    """Local memory a thread uses, from the cubin's resource usage."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@contextmanager
def compiling_for(arch: str):
    """Inside, every kernel launch compiles for ``arch`` and is appended to the list."""
    compiled: list[Compiled] = []
    launch, machine = JITFunction.run, tiles.machine

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        spills = spilled_bytes(kernel.asm["cubin"])
        compiled.append(Compiled(self.__name__, kernel.metadata.shared, spills, kernel.asm["ptx"]))
        return kernel

    triton.runtime.driver.set_active(AbsentGPU(arch))
    JITFunction.run = compile_only
    tiles.machine = lambda device: tiles.Machine(arch, PROCESSORS[arch], overlap=arch in ("sm_90", "sm_120"))
    try:
        yield compiled
    finally:
        JITFunction.run, tiles.machine = launch, machine


def shipped(arch: str, dtypes: list[torch.dtype]):
    """Launches every tile of a table, with sizes that its rule is for."""
    rules = tiles.table(arch)
    for dtype in dtypes:
        size = dtype.itemsize
        for kernel in ("attention_prefill", "attention_decode") if size == 2 else ():  # float32: the library's
            for rule in rules[kernel]:
                dim = rule["max"]["dim"]
                if rule["max"].get("element", 4) != size:  # rules for two bytes come first: no other is reached
                    continue
                q, k = torch.empty(2, 512, 8, dim, dtype=dtype), torch.empty(2, 512, 2, dim, dtype=dtype)
                lens, mask = torch.empty(2, dtype=torch.int32), torch.empty(2, 1, 512, 512, dtype=torch.bool)
                if kernel == "attention_prefill":
                    attention_prefill.attention_prefill(q, k, k, True, None, None, 0.1, rule["tile"])
                    attention_prefill.attention_prefill(q, k, k, True, lens, mask, 0.1, rule["tile"])
                else:
                    attention_decode.attention_decode(q[:, :1], k, k, True, lens, None, 0.1, rule["tile"])
                    few = 4 if "rows" in rule["max"] else 16
                    attention_decode.attention_decode(q[:, :few], k, k, True, None, mask[:, :, :few], 0.1, rule["tile"])
        weights = torch.empty(512, 1024, dtype=dtype)
        for kernel in ("few_rows", "few_rows_gated"):
            for rule in rules[kernel]:
                if size <= rule["max"].get("element", 4):
                    for m in (1, rule["max"].get("rows", 64)):
                        gated = weights if kernel == "few_rows_gated" else None
                        ffn.few_rows(weights[:m], weights, gated, rule["tile"])
        for rule in rules["gate_up"]:
            if size <= rule["max"].get("element", 4):
                ffn.gate_up(weights, weights, weights, rule["tile"])
        quantized_shipped(rules, dtype)
        if arch == "sm_90" and size == 2:
            for dim in (64, 128):
                q, k = torch.empty(2, 512, 8, dim, dtype=dtype), torch.empty(2, 512, 2, dim, dtype=dtype)
                attention_prefill_sm90.attention_prefill_sm90(q, k, k, True, 0.1)
        x = torch.empty(2, 64, 8, 128, dtype=dtype)
        angle = torch.empty(64, 64)
        ffn.silu_mul_(weights, weights)
        rmsnorm.add_rms_norm(weights, weights, weights[0], 1e-5)
        for interleaved in (False, True):
            rope.rope_write(x, x, x, angle, angle, x, x, torch.empty(2, dtype=torch.int64), interleaved)


def quantized_shipped(rules: tiles.Table, dtype: torch.dtype) -> None:
    kinds = [random_weight(format, 512, 1024, group, zeros=zeros) for format, group, zeros in QUANTIZED]
    for weight in kinds:
        quantized.dequantize(weight, dtype)
    for kernel in ("quantized", "quantized_gated") if dtype.itemsize == 2 else ():  # float32: the library's
        for number, rule in enumerate(rules[kernel]):
            for weight in kinds if number == 0 else kinds[:1]:
                for m in {1, rule["max"].get("rows", quantized.ROWS_MAX)}:
                    x = torch.empty(m, 1024, dtype=dtype)
                    quantized.linear(x, weight, weight if kernel == "quantized_gated" else None, rule["tile"])


def main() -> None:
    arch, dtypes = sys.argv[1], [getattr(torch, name) for name in sys.argv[2].split(",")]
    with compiling_for(arch) as compiled:
        shipped(arch, dtypes)
    rows = [
        {
            "name": c.name,
            "shared": c.shared,
            "spills": c.spills,
            "wgmma": c.ptx.count("wgmma.mma_async"),
            "mma": c.ptx.count("mma.sync"),
            "copies": c.ptx.count("cp.async.bulk.tensor"),
        }
        for c in compiled
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

"""FFN against cuBLAS (eager), torch.compile, Liger and gemlite (16-bit weights), Llama-3.1-70B and 8B widths, bf16.

``python bench/bench_ffn.py --out bench/results/ffn.json``. In CUDA graphs; the weights do not fit L2.

"three cuBLAS products" is the time of the three cuBLAS products alone: what a free epilogue would give.
"""

# ruff: noqa: B023  (the calls of a row run before the loop goes on)

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timer import COLD_BYTES, Bench, main

from mhaffn import ops
from mhaffn.kernels import ffn, library, nvrtc, reference

WIDTHS = {"70B": (8192, 28672), "8B": (4096, 14336)}


def liger(x, w1, w3, w2):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return F.linear(LigerSiLUMulFunction.apply(F.linear(x, w1), F.linear(x, w3)), w2)


class Gemlite:
    """Its Triton products of 16-bit weights, which it tunes at the first call of a shape; SiLU·mul by PyTorch."""

    def __init__(self) -> None:
        self.layers: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def linear(self, x, w):
        if w.data_ptr() not in self.layers:
            from gemlite.core import DType, GemLiteLinearTriton

            bf16 = DType.BF16
            layer = GemLiteLinearTriton(16, None, w.shape[1], w.shape[0], input_dtype=bf16, output_dtype=bf16)
            layer.pack(w, None, None, None)
            self.layers[w.data_ptr()] = layer
        return self.layers[w.data_ptr()](x)

    def __call__(self, x, w1, w3, w2):
        return self.linear(F.silu(self.linear(x, w1)) * self.linear(x, w3), w2)


def gate_up(x, w1, w3, w2):
    return F.linear(ffn.gate_up(x, w1, w3), w2)


def run(bench: Bench) -> None:
    for model, (width, inner) in WIDTHS.items():
        size = 3 * width * inner * 2
        count = max(1, COLD_BYTES // size)
        shapes = ((inner, width), (inner, width), (width, inner))
        sets = [[torch.randn(*s, device="cuda", dtype=torch.bfloat16) * 0.02 for s in shapes] for _ in range(count)]
        wide = [w.float() for w in sets[0]]
        gemlite = Gemlite()
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192) if model == "70B" else (1, 2, 4, 8, 16, 64, 512, 2048):
            x = torch.randn(m, width, device="cuda", dtype=torch.bfloat16)
            truth = reference.ffn(x, *wide) if m <= 2048 else library.ffn(x, *sets[0])
            peers = {"mhaffn.ops.ffn": ops.ffn, "cuBLAS eager": library.ffn}
            if m <= ffn.FEW_ROWS_MAX:
                peers["Triton few rows"] = ffn.ffn_few_rows
            if m <= nvrtc.FEW_ROWS_MAX:
                peers["CUDA few rows"] = nvrtc.ffn_few_rows
            if m in (1, 16, 64, 512):
                peers["gemlite, 16-bit"] = gemlite
            if m >= 128:
                peers["Triton gate_up + cuBLAS"] = gate_up
                peers["Liger SiLU·mul + cuBLAS"] = liger
            if m >= 512:
                torch._dynamo.reset()
                peers["torch.compile"] = torch.compile(
                    lambda *a: F.linear(F.silu(F.linear(a[0], a[1])) * F.linear(a[0], a[2]), a[3]), dynamic=False
                )
            calls = {name: [lambda w=w, peer=peer: peer(x, *w) for w in sets] for name, peer in peers.items()}
            flops = 6 * m * width * inner
            bench.compare(f"ffn {model} M={m}", calls, truth, bytes_moved=size if m <= 64 else 0, flops=flops)
            if m >= 512:
                hidden = torch.randn(m, inner, device="cuda", dtype=torch.bfloat16)
                w1, w3, w2 = sets[0]
                products = [lambda: (F.linear(x, w1), F.linear(x, w3), F.linear(hidden, w2))]
                again = {"mhaffn.ops.ffn": [lambda: ops.ffn(x, w1, w3, w2)], "three cuBLAS products": products}
                bench.compare(f"ffn {model} M={m}, products", again, None, flops=flops)
        del sets, wide, gemlite


if __name__ == "__main__":
    main("ffn", run)

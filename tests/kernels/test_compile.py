"""Ahead-of-time compilation, no GPU needed: every shipped tile, and every CUDA source."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mhaffn.kernels import nvrtc, nvrtc_attention, nvrtc_quantized, tiles

from . import sass

SCRIPT = Path(__file__).with_name("aot.py")
ROOT = Path(__file__).parents[2]
SPILL_BYTES_MAX = 512  # a thread; only heads of 256 with a mask come near it
CUDA_SPILL_BYTES_MAX = 256

QUICK = [("sm_90", "bfloat16"), ("sm_120", "bfloat16")]
FULL = [(arch, dtype) for arch in tiles.SHARED_MEMORY_LIMIT for dtype in ("bfloat16", "float16", "float32")]
CASES = [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow], id="-".join(c)) for c in FULL]


def compile_tiles(arch, dtype):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # may put another Triton first
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, str(SCRIPT), arch, dtype], env=environment, capture_output=True, text=True)


@pytest.mark.ahead(work=compile_tiles)
@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_shipped_tiles_compile(arch, dtype, ahead):
    assert ahead.returncode == 0, ahead.stderr[-3000:]
    compiled = json.loads(ahead.stdout)
    assert len(compiled) >= (8 if dtype == "float32" else 30)
    for kernel in compiled:
        assert kernel["shared"] <= tiles.SHARED_MEMORY_LIMIT[arch], kernel
        assert kernel["spills"] <= SPILL_BYTES_MAX, kernel
    if arch == "sm_90" and dtype == "bfloat16":
        prefill = [k for k in compiled if k["name"] in ("prefill_kernel", "prefill_sm90_kernel", "gate_up_kernel")]
        assert len({k["name"] for k in prefill}) == 3 and all(k["wgmma"] for k in prefill)
        assert all(k["copies"] for k in prefill if k["name"] != "prefill_kernel")


QUANTIZED = [
    # format, scales, zeros, words of a load
    ("int4", torch.bfloat16, False, 4),
    ("int4", torch.float32, True, 2),
    ("int8", torch.float16, False, 4),
    ("fp8", torch.bfloat16, False, 1),
]


def _cuda_cases():
    """(source, architecture, options) of every tile, of every kind of weight for one tile a table."""
    seen = set()
    for arch in tiles.SHARED_MEMORY_LIMIT:
        table = tiles.table(arch)
        for half, dim, rule in itertools.product((False, True), nvrtc_attention.DIMS, table["attention_decode_cuda"]):
            seen.add((nvrtc_attention.SOURCE, arch, nvrtc_attention.defines(half, dim, rule["tile"])))
        for half, gated in itertools.product((False, True), repeat=2):
            dtype = torch.float16 if half else torch.bfloat16
            suffix = "_gated" if gated else ""
            for rule in table[f"few_rows_cuda{suffix}"]:
                options = nvrtc.few_rows_defines(half, gated, rule["max"]["columns"], rule["tile"])
                seen.add(("ffn_few_rows.cu", arch, options))
            for number, rule in enumerate(table[f"quantized_cuda{suffix}"]):
                for format, scales, zeros, words in QUANTIZED if number == 0 else QUANTIZED[:1]:
                    columns = rule["max"]["columns"]
                    options = nvrtc_quantized.defines(dtype, format, scales, zeros, gated, columns, words, rule["tile"])
                    seen.add((nvrtc_quantized.SOURCE, arch, options))
            if arch == "sm_90" and not gated:
                for number, rule in enumerate(table["quantized_sm90"]):
                    for format, scales, zeros, _ in QUANTIZED if number == 0 else QUANTIZED[:1]:
                        for by_row in (False,) if zeros else (False, True):
                            options = nvrtc_quantized.sm90_defines(dtype, format, scales, zeros, by_row, rule["tile"])
                            seen.add((nvrtc_quantized.SOURCE_SM90, "sm_90a", options))
    return sorted(seen)


CUDA_SOURCES = sorted(nvrtc.SOURCES.glob("*.cu"))
CUDA_CASES = [
    pytest.param(*case, marks=[] if case[1] in ("sm_90", "sm_90a") and "-DHALF=0" in case[2] else [pytest.mark.slow])
    for case in _cuda_cases()
]


def test_every_cuda_source_has_its_cases():
    assert {source.name for source in CUDA_SOURCES} == {case[0] for case in _cuda_cases()}


def compile_cuda(name, arch, options):
    """What nvcc tells and, of the sm_90 source, the instructions it makes; (None, None) where there is only NVRTC."""
    source = nvrtc.SOURCES / name
    options = [*options, "-std=c++17", f"-I{nvrtc.SOURCES}"]
    if nvcc := shutil.which("nvcc"):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out.cubin"
            command = [nvcc, "-cubin", f"-arch={arch}", "-Xptxas=-v", *options, "-o", str(out), str(source)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            code = sass.disassembled(out, "linear_sm90") if name == nvrtc_quantized.SOURCE_SM90 else []
            return run.stderr, code
    if (root := _nvrtc_wheel()) is None:
        pytest.skip("neither nvcc nor the nvidia-cuda-nvrtc wheel is installed")
    _compile_with_nvrtc(root, source.read_text(), [f"--gpu-architecture={arch}", *options])
    return None, None


def _nvrtc_wheel() -> Path | None:
    """The folder of NVIDIA's wheels that holds libnvrtc and the CUDA headers."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        for folder in Path(place).glob("cu*"):
            if list(folder.glob("lib/libnvrtc.so*")) and (folder / "include" / "cuda_bf16.h").exists():
                return folder
    return None


def _compile_with_nvrtc(root: Path, code: str, options: list[str]) -> None:
    library = ctypes.CDLL(str(next(root.glob("lib/libnvrtc.so*"))))
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None) == 0
    options = [*options, f"-I{root / 'include'}"]
    array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = library.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()


@pytest.mark.ahead(work=compile_cuda)
@pytest.mark.parametrize(("name", "arch", "options"), CUDA_CASES)
def test_cuda_source_compiles(name, arch, options, ahead):
    told, code = ahead
    if told is None:
        return
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", told)]
    assert spilled and max(spilled) <= CUDA_SPILL_BYTES_MAX, told
    assert "wgmma.mma_async instructions are serialized" not in told
    if name == nvrtc_quantized.SOURCE_SM90:
        assert any("HGMMA" in text for _, text in code)
        assert not sass.hazards(code), "\n".join(sass.hazards(code)[:8])

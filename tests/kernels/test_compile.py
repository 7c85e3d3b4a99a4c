"""Ahead-of-time compilation, no GPU needed: every shipped tile, and every CUDA source."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mhaffn.kernels import nvrtc, tiles

SCRIPT = Path(__file__).with_name("aot.py")
ROOT = Path(__file__).parents[2]
SPILL_BYTES_MAX = 512  # a thread; only heads of 256 with a mask come near it

QUICK = [("sm_90", "bfloat16"), ("sm_120", "bfloat16")]
FULL = [(arch, dtype) for arch in tiles.SHARED_MEMORY_LIMIT for dtype in ("bfloat16", "float16", "float32")]
CASES = [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow], id="-".join(c)) for c in FULL]


@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_shipped_tiles_compile(arch, dtype):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # may put another Triton first
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, str(SCRIPT), arch, dtype], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = json.loads(run.stdout)
    assert len(compiled) >= (8 if dtype == "float32" else 30)
    for kernel in compiled:
        assert kernel["shared"] <= tiles.SHARED_MEMORY_LIMIT[arch], kernel
        assert kernel["spills"] <= SPILL_BYTES_MAX, kernel
    if arch == "sm_90" and dtype == "bfloat16":
        prefill = [k for k in compiled if k["name"] in ("prefill_kernel", "prefill_sm90_kernel", "gate_up_kernel")]
        assert len({k["name"] for k in prefill}) == 3 and all(k["wgmma"] for k in prefill)
        assert all(k["copies"] for k in prefill if k["name"] != "prefill_kernel")


def _tiles_of_cuda_kernels():
    seen = set()
    for arch in tiles.SHARED_MEMORY_LIMIT:
        for kernel in ("few_rows_cuda", "few_rows_cuda_gated"):
            for rule in tiles.table(arch)[kernel]:
                for half in (False, True):
                    options = nvrtc.few_rows_defines(
                        half, kernel.endswith("gated"), rule["max"]["columns"], rule["tile"]
                    )
                    seen.add((arch, options))
    return sorted(seen)


CUDA_SOURCES = sorted(nvrtc.SOURCES.glob("*.cu"))
CUDA_CASES = [
    pytest.param(arch, options, marks=[] if arch in ("sm_90", "sm_120") else [pytest.mark.slow])
    for arch, options in _tiles_of_cuda_kernels()
]


def test_every_cuda_source_has_its_cases():
    assert [source.name for source in CUDA_SOURCES] == ["ffn_few_rows.cu"]


@pytest.mark.parametrize(("arch", "options"), CUDA_CASES)
def test_cuda_source_compiles(arch, options, tmp_path):
    source = nvrtc.SOURCES / "ffn_few_rows.cu"
    if nvcc := shutil.which("nvcc"):
        command = [
            nvcc,
            "-cubin",
            f"-arch={arch}",
            "-std=c++17",
            *options,
            "-o",
            str(tmp_path / "out.cubin"),
            str(source),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    elif root := _nvrtc_wheel():
        _compile_with_nvrtc(root, source.read_text(), [f"--gpu-architecture={arch}", "--std=c++17", *options])
    else:
        pytest.skip("neither nvcc nor the nvidia-cuda-nvrtc wheel is installed")


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

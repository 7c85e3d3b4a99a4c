"""Runs tests/kernels/interpreted.py, a process a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted.py")
ROOT = Path(__file__).parents[2]


def interpreted(kernel: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), kernel], env=environment, capture_output=True, text=True)


@pytest.mark.ahead(work=interpreted)
@pytest.mark.parametrize(
    "kernel",
    [
        "attention_decode",
        pytest.param("attention_prefill", marks=pytest.mark.slow),
        "ffn",
        "model",
        "quantized",
        "rmsnorm",
        "rope",
    ],
)
def test_kernel_in_the_interpreter(kernel, ahead):
    assert ahead.returncode == 0, ahead.stderr[-3000:]

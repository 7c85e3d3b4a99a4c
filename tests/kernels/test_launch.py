"""How kernels are launched: what needs no GPU."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from mhaffn import ops
from mhaffn.kernels import launch


def test_arguments_reach_the_driver_as_the_kernel_declares_them(monkeypatch):
    seen = {}

    def to_driver(configuration, function, pointers, extra):
        kinds = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_void_p)
        seen["arguments"] = [kind.from_address(at).value for kind, at in zip(kinds, pointers, strict=True)]
        c = configuration._obj
        seen["grid"] = (c.grid_x, c.grid_y, c.grid_z, c.block_x, c.block_y, c.block_z, c.shared, c.stream)
        seen["attributes"] = (bool(c.attributes), c.attribute_count)
        seen["function"], seen["extra"] = function.value, extra
        return 0

    monkeypatch.setattr(launch, "_launch", lambda: to_driver)
    kernel = launch.Function(0x7F00, "PqiP", threads=96, shared=512, overlap=True)
    kernel((7, 2), 0x55, 1 << 40, 1 << 35, 3, 1 << 41)
    assert seen["arguments"] == [1 << 40, 1 << 35, 3, 1 << 41]
    assert seen["grid"] == (7, 2, 1, 96, 1, 1, 512, 0x55)
    assert seen["attributes"] == (True, 1)
    assert (seen["function"], seen["extra"]) == (0x7F00, None)


def test_an_error_of_the_driver_is_told(monkeypatch):
    monkeypatch.setattr(launch, "_launch", lambda: lambda *arguments: 701)
    with pytest.raises(RuntimeError, match="got CUDA error 701, expected 0"):
        launch.Function(1, "i", 32)((1, 1), 0, 5)


def test_a_thread_that_has_not_used_the_gpu_gets_its_context(monkeypatch):
    bound, launched = [], []

    def to_driver(*arguments):
        launched.append(arguments)
        return 0 if bound else launch.NO_CONTEXT

    monkeypatch.setattr(launch, "_launch", lambda: to_driver)
    monkeypatch.setattr(launch, "_bind_context", bound.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    function = launch.Function(1, "i", 32)
    function((1, 1), 0, 5)
    function((1, 1), 0, 6)
    assert bound == [3] and len(launched) == 3
    bound.clear()
    monkeypatch.setattr(launch, "_bind_context", lambda index: None)
    with pytest.raises(RuntimeError, match="got CUDA error 201"):
        function((1, 1), 0, 7)


class Kernel:
    """Stands for a Triton kernel: notes what it compiles, and what then runs."""

    params = tuple(SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in ("p_x", "eps", "n", "BLOCK"))

    def __init__(self) -> None:
        self.compiled, self.ran = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return {g: lambda *a, g=g: self.ran.append((g, a)) for g in [(1, 1, 1), (2, 1, 1)]}

        return run


def test_a_kernel_is_compiled_once_for_each_kind_of_arguments():
    kernel = Kernel()
    jit = launch.Jit(kernel)
    x, other = torch.zeros(64), torch.zeros(64)

    def run(x, eps, n, block=8, warps=4, grid=1):
        jit((grid, 1, 1), (x,), (eps,), (n,), BLOCK=block, num_warps=warps)
        return len(kernel.compiled), len(kernel.ran)

    assert run(x, 0.5, 32) == (1, 0)
    assert run(x, 0.5, 32) == (1, 1)
    assert run(other, 0.25, 64, grid=2) == (1, 2)
    assert kernel.ran[-1] == ((2, 1, 1), (other.data_ptr(), 0.25, 64, 8))
    differing = [
        (x[1:], 0.5, 32), (x.half(), 0.5, 32), (None, 0.5, 32), (x, 0.5, 33), (x, 0.5, 1), (x, 0.5, 1 << 32),
        (x, 0.5, (1 << 32) + 1), (x, 0.5, 32, 16), (x, 0.5, 32, 8, 8),
    ]  # fmt: skip
    for count, arguments in enumerate(differing, 2):
        if arguments[0] is not None:
            assert run(*arguments)[0] == count
            assert run(*arguments)[0] == count
            continue
        for _ in range(2):
            jit((1, 1, 1), (x, None), (0.5,), (32,), BLOCK=8, num_warps=4)
        assert len(kernel.compiled) == count and kernel.ran[-1][1] == (x.data_ptr(), None, 0.5, 32, 8)


def test_the_interpreter_compiles_nothing():
    calls = []

    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *arguments, **options: calls.append(arguments)

    jit = launch.Jit(Interpreted())
    for _ in range(2):
        jit((1, 1, 1), (torch.zeros(4),), (0.5,), (4,), BLOCK=8, num_warps=4)
    assert len(calls) == 2


def test_shipped_kernels_have_their_parameters_in_the_order_that_launches_take():
    from mhaffn.kernels import attention_decode, ffn, rmsnorm, rope

    for jit in (attention_decode._split, attention_decode._combine, ffn._few_rows, rmsnorm._kernel, rope._kernel):
        names = [parameter.name for parameter in jit.kernel.params]
        floats = {"eps", "scale_log2"}
        kinds = ["p" if n.startswith("p_") else "f" if n in floats else "C" if n.isupper() and p.is_constexpr else "i"
                 for n, p in zip(names, jit.kernel.params, strict=True)]  # fmt: skip
        assert "".join(kinds) == "".join(sorted(kinds, key="pfiC".index)), names


def test_triton_makes_different_code_for_no_more_than_is_told_apart():
    """Shipped launches reuse what was compiled for numbers of one kind."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl

    found: dict[int, set[object]] = {}
    numbers = [*range(70), 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**33, 2**40 + 8]
    for number in numbers:
        told = native_specialize_impl(CUDABackend(GPUTarget("cuda", 90, 32)).__class__, number, False, True, True)
        found.setdefault(launch.kind(number), set()).add(told)
    assert len(found) == 5 and all(len(kinds) == 1 for kinds in found.values()), found


@pytest.mark.gpu
def test_a_thread_whose_first_use_of_the_gpu_is_a_launch():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    x, *weights = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in [(1, 256), (512, 256), (512, 256)])
    weights.append(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    want = ops.ffn(x, *weights)  # also leaves memory to take: an allocation would bind a context
    torch.cuda.synchronize()
    with torch.no_grad(), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(ops.ffn, x, *weights).result(), want)

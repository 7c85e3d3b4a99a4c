"""Launches that cost the host a few µs: of CUDA functions through the driver, and of what Triton has compiled.

A decoded token makes hundreds of launches. CuPy's and Triton's own bind, check and look up their arguments each time,
which can take longer than the kernels run.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
INT32_MAX = 2**31 - 1
RECENT = 64
"""Sets of integers that a kernel's launches remember."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Configuration(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


_OVERLAPPING = _Attribute(OVERLAP, 0, (ctypes.c_int * 16)(1))


@cache
def driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _launch() -> Any:
    return driver().cuLaunchKernelEx


def _bind_context(index: int) -> None:
    """Gives this thread the context that PyTorch uses: what binds one to a thread is the first use of the GPU there."""
    context = ctypes.c_void_p()
    status = driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), index) or driver().cuCtxSetCurrent(context)
    if status:
        raise RuntimeError(f"cuCtxSetCurrent: got CUDA error {status}, expected 0")


class Function(threading.local):
    """A CUDA function and the memory that its launches are described in.

    ``arguments`` are :mod:`struct` codes: ``P`` a pointer, ``q`` 64 bits, ``i`` 32 bits, ``f`` a float. With
    ``overlap`` (programmatic dependent launch) the kernel itself waits for the one before it. The driver copies what it
    is given; each thread has memory of its own.
    """

    def __init__(self, function: int, arguments: str, threads: int, shared: int = 0, overlap: bool = False) -> None:
        code = struct.Struct(f"@{arguments}")
        memory = ctypes.create_string_buffer(code.size)
        ends = [struct.calcsize(f"@{arguments[: i + 1]}") for i in range(len(arguments))]
        starts = [end - struct.calcsize(kind) for end, kind in zip(ends, arguments, strict=True)]
        self.pack, self.memory = code.pack_into, memory
        self.pointers = (ctypes.c_void_p * len(starts))(*(ctypes.addressof(memory) + start for start in starts))
        attributes = (ctypes.addressof(_OVERLAPPING), 1) if overlap else (None, 0)
        self.configuration = _Configuration(0, 0, 1, threads, 1, 1, shared, None, *attributes)
        self.reference = ctypes.byref(self.configuration)
        self.function = ctypes.c_void_p(function)

    def __call__(self, grid: tuple[int, int], stream: int, *arguments: float) -> None:
        self.pack(self.memory, 0, *arguments)
        configuration = self.configuration
        configuration.grid_x, configuration.grid_y = grid
        configuration.stream = stream
        status = _launch()(self.reference, self.function, self.pointers, None)
        if status == NO_CONTEXT:
            _bind_context(torch.cuda.current_device())
            status = _launch()(self.reference, self.function, self.pointers, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx: got CUDA error {status}, expected 0")


def kind(number: int) -> int:
    """What Triton makes different code for: 1, multiples of 16, and numbers past 32 bits."""
    return -1 if number == 1 else (number % 16 == 0) + 2 * (number > INT32_MAX)


class Jit:
    """A Triton kernel whose parameters are tensors, then floats, then integers, then constants.

    The first launch of each kind goes through Triton, and gives what it compiled. Later ones are found by all that
    it makes different code for: device, constants and options, dtypes, addresses that are multiples of 16, and
    :func:`kind` of the integers. The layers of a pass have the same integers, so those are looked for first. Tensors
    are on the current GPU, which nothing checks here. Triton's hooks before and after a launch run; those that look at
    what is bound do not.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        self._recent: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        floats: tuple[float, ...],
        integers: tuple[int, ...],
        **options: Any,
    ) -> None:
        addresses: list[int | None] = []
        same: list[Any] = [*options.values(), tensors[0].get_device()]  # type: ignore[union-attr]
        for t in tensors:
            address = None if t is None else t.data_ptr()
            addresses.append(address)
            same.append(None if t is None else t.dtype)
            same.append(address is not None and address % 16 == 0)
        recent = (integers, *same)
        found = self._recent.get(recent)
        if found is None:
            kinds = (*same, *map(kind, integers))
            found = self._compiled.get(kinds)
            if found is None:
                compiled = self.kernel[grid](*tensors, *map(float, floats), *integers, **options)
                if compiled is not None:  # Triton's interpreter compiles nothing
                    names = (parameter.name for parameter in self.kernel.params if parameter.is_constexpr)
                    self._compiled[kinds] = compiled, tuple(options[name] for name in names)
                return
            if len(self._recent) >= RECENT:
                self._recent.clear()
            self._recent[recent] = found
        compiled, constants = found
        compiled[grid](*addresses, *floats, *integers, *constants)


def contiguous_like(x: Tensor) -> Tensor:
    """Memory for a result shaped as x: in half the time of ``torch.empty`` where x is contiguous."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def stream_of(index: int) -> int:
    """The current stream of a GPU, as the driver takes it."""
    return int(torch._C._cuda_getCurrentRawStream(index))

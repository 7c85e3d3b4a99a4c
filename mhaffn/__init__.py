"""Llama-class models that do not fit the GPU: MHA and FFN weights streamed from NVMe and DRAM.

Three ways in: :mod:`mhaffn.ops` (fused kernels as functions), :func:`load` (a streamed model with
``generate()``), and the ``mhaffn`` command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhaffn.hf import StreamedLlama, load

__version__ = "0.1.0"
__all__ = ["StreamedLlama", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Loads transformers only when it is asked for: ``import mhaffn.ops`` must stay light."""
    if name in ("StreamedLlama", "load"):
        from mhaffn import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Llama-class models that do not fit the GPU: MHA and FFN weights streamed from NVMe and DRAM.

Ways in: :mod:`mhaffn.ops` (fused kernels as functions), :func:`replace` (a live model of existing code on those
kernels), :func:`register_attention` (only attention, by name), :func:`load` (a streamed model with ``generate()``),
and the ``mhaffn`` command.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhaffn.attention_interface import register_attention
    from mhaffn.hf import StreamedLlama, load
    from mhaffn.replacement import Replacement, replace, restore

__version__ = "0.1.0"
__all__ = ["Replacement", "StreamedLlama", "__version__", "load", "register_attention", "replace", "restore"]

_HOMES = {
    "StreamedLlama": "hf",
    "load": "hf",
    "Replacement": "replacement",
    "replace": "replacement",
    "restore": "replacement",
    "register_attention": "attention_interface",
}


def __getattr__(name: str) -> Any:
    """Loads transformers only when it is asked for: ``import mhaffn.ops`` must stay light."""
    if name in _HOMES:
        return getattr(import_module(f"mhaffn.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

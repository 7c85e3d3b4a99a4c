"""Llama-class models that do not fit the GPU: MHA and FFN weights streamed from NVMe and DRAM."""

__version__ = "0.1.0"

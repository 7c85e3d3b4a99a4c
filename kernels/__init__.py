"""The kernels behind :mod:`mhaffn.ops`; import them as ``mhaffn.kernels``, never by this folder's name."""

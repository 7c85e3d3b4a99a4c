"""Bytes on disk: model folders read in place, and packed stores."""

from mhaffn.store.format import Record, Store, SublayerRecords
from mhaffn.store.pack import PackProgress, pack
from mhaffn.store.resolve import resolve

__all__ = ["PackProgress", "Record", "Store", "SublayerRecords", "pack", "resolve"]

"""Everything mhaffn raises on purpose.

::

    MhaffnError
    ├── ConfigError                 a setting or a config.json that cannot be used
    │   └── UnsupportedModelError   an architecture or option mhaffn does not run
    ├── StoreError                  a model folder or file that cannot be used
    │   ├── CorruptFileError        bytes that contradict themselves: header, offsets, shapes
    │   └── ChecksumError           bytes that differ from what was packed
    ├── ReadError                   a read that failed: op, path, offset, length, errno
    │   ├── TruncatedFileError      the file ended before the bytes it should hold
    │   ├── ReadTimeoutError        not done in time; the request goes on
    │   └── ReadCancelledError      cancelled, or its reader closed
    ├── EngineUnavailableError      the engine or mode asked for does not work here
    ├── PinnedMemoryError           host memory could not be mapped, locked or leased
    ├── BudgetError                 a memory budget below the minimum, which it names; or GPU memory that ran out
    └── StreamError                 the stream was used after close, after failure, or out of order
"""

from __future__ import annotations


class MhaffnError(Exception):
    """Base of every error mhaffn raises on purpose."""


class ConfigError(MhaffnError, ValueError):
    """A setting or a config.json that cannot be used."""


class UnsupportedModelError(ConfigError):
    """An architecture or option mhaffn does not run; the message lists what it does."""


class StoreError(MhaffnError):
    """A model folder or file that cannot be used."""


class CorruptFileError(StoreError, ValueError):
    """Bytes that contradict themselves: a header, an offset, a shape, a manifest."""


class ChecksumError(StoreError):
    """Bytes that differ from what was packed."""


class ReadError(MhaffnError, OSError):
    """A read that failed.

    Attributes: ``op`` (the system call or step), ``path``, ``offset`` and ``length`` in bytes,
    ``errno`` (0 where no system call failed).
    """

    def __init__(
        self, message: str, *, op: str = "read", path: str = "", offset: int = 0, length: int = 0, errno: int = 0
    ) -> None:
        super().__init__(errno, message)
        self.op = op
        self.path = path
        self.offset = offset
        self.length = length
        self.message = message

    def __str__(self) -> str:
        return self.message


class TruncatedFileError(ReadError):
    """The file ended before the bytes it should hold; ``offset`` is where it ended."""


class ReadTimeoutError(ReadError, TimeoutError):
    """The wait ran out; the request goes on and may be waited for again."""


class ReadCancelledError(ReadError):
    """The request was cancelled, or its reader closed, before it completed."""


class EngineUnavailableError(MhaffnError, RuntimeError):
    """The engine or mode asked for does not work here; the message says why and what to do."""


class PinnedMemoryError(MhaffnError, MemoryError):
    """Host memory could not be mapped, locked or leased."""


class BudgetError(MhaffnError, ValueError):
    """A memory budget below the minimum, which the message names; or GPU memory that ran out all the same."""


class StreamError(MhaffnError, RuntimeError):
    """The stream was used after close, after failure, or out of order."""

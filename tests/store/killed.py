"""Packs in a process that kills itself at a chosen step; a step is any call that changes or orders the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes import context

STEPS = ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "ftruncate"), (os, "symlink"), (os, "mkdir"))


def pack_and_die(source: Path, target: Path, step: int, **places: Any) -> bool:
    """Packs until just before ``step``; says whether the process was killed (False: it finished before)."""
    process = context.Process(target=_run, args=(source, target, step, places))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _run(source: Path, target: Path, step: int, places: dict[str, Any]) -> None:
    import torch

    from mhaffn.store import pack
    from mhaffn.store.source import FolderSource

    torch.set_num_threads(1)
    left = step

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*arguments, **options)

        return wrapper

    for module, name in STEPS:
        setattr(module, name, counted(getattr(module, name)))
    FolderSource.tensor = counted(FolderSource.tensor)  # type: ignore[method-assign]  # in the middle of a file
    pack(source, target, **places)

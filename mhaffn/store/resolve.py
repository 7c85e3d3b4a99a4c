"""From what a user calls a model to the folder that holds it."""

from __future__ import annotations

import os
from pathlib import Path

from mhaffn.errors import StoreError
from mhaffn.store.manifest import refuse_unfinished


def resolve(model: str | Path, *, enough: str = "") -> Path:
    """The folder of ``model``: a path, or a hub id (``org/name``) found in the local cache.

    ``enough`` names the one file that is needed, where that is so. Nothing is downloaded. Raises
    :class:`StoreError` with what to do when there is no such folder, or when it is an unfinished pack.
    """
    name = os.fspath(model)
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise StoreError(f"{name}: {error}. Give the folder's whole path.") from error
    if path.is_dir():
        refuse_unfinished(path)
        return path
    if path.suffix.lower() == ".gguf":
        problem = "is a GGUF file: make a store of it first" if path.is_file() else "does not exist"
        raise StoreError(f"{path} {problem} (mhaffn pack {path} DST, then mhaffn run DST)")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        problem = "is a file" if path.exists() else "does not exist"
        raise StoreError(f"{path} {problem}. Give a folder with config.json, or a hub id such as org/name.")
    return _cached(name, enough)


def _cached(repo_id: str, enough: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        # The hub calls a snapshot incomplete for want of any file of the repository, pictures too. Whether
        # all that a model needs is there is found on opening it.
        partial = getattr(error, "snapshot_path", None)
        if partial is not None:
            return Path(partial)
        raise StoreError(
            f"{repo_id} is neither a folder nor a model in the local hub cache. "
            f"Fetch {enough or 'it'} with: hf download {repo_id} {enough}".rstrip()
        ) from None

"""From what a user calls a model to its folder: paths, and the hub's cache of links to blobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from mhaffn.errors import CorruptFileError, StoreError, TruncatedFileError
from mhaffn.store import Store, resolve
from tests.store.models import INDEX, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the sharded model org/name: every file of the snapshot is a link to a blob."""
    hub = tmp_path / "hub"
    make_cached_model(hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    return hub


def make_cached_model(hub: Path) -> None:
    repo = hub / "models--org--name"
    snapshot, blobs = repo / "snapshots" / COMMIT, repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    write_model(repo / "whole", shards=3)
    for number, path in enumerate(sorted((repo / "whole").iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    (repo / "whole").rmdir()


def test_a_hub_id_is_found_in_the_cache_and_its_links_are_followed(cache: Path) -> None:
    folder = resolve("org/name")
    assert folder == cache / "models--org--name" / "snapshots" / COMMIT
    assert (folder / "config.json").is_symlink()
    assert len(Store.open(folder).sublayers) == 4


def test_hf_home_says_where_the_cache_lies(tmp_path: Path) -> None:
    make_cached_model(tmp_path / "hub")
    program = "from mhaffn.store import Store, resolve; print(Store.open(resolve('org/name')).path)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"HF_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.strip() == str(tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT)


def test_a_blob_that_is_gone_or_cut_short(cache: Path) -> None:
    folder = resolve("org/name")
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard.resolve(), shard.stat().st_size - 1)
    with pytest.raises(TruncatedFileError, match=shard.name):
        Store.open(folder)
    shard.resolve().unlink()
    with pytest.raises(StoreError, match=rf"{shard.name} is a link to .*which does not exist. Mount .* or fetch"):
        Store.open(folder)
    (folder / INDEX).resolve().unlink()
    with pytest.raises(CorruptFileError, match=f"{INDEX} is a link to a file that is not there"):
        Store.open(folder)


def test_a_snapshot_that_lacks_files_no_model_needs(cache: Path) -> None:
    """`hf download --include` leaves pictures and other formats out; the hub then calls the snapshot incomplete."""
    listing = pytest.importorskip("huggingface_hub._tree_cache")
    names = [*(path.name for path in resolve("org/name").iterdir()), "picture.png"]
    entries = {name: listing.TreeCacheEntry(1, "0" * 40, None, None, None) for name in names}
    listing.write_tree_cache(str(cache / "models--org--name"), COMMIT, entries)
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        huggingface_hub.snapshot_download("org/name", local_files_only=True)
    assert len(Store.open(resolve("org/name")).sublayers) == 4


@pytest.mark.parametrize("name", ["org/other", "org/na me", "org/..", "o/n--m", "x/" + "y" * 200, "org/\0"])
def test_a_model_that_is_nowhere(name: str, cache: Path) -> None:
    with pytest.raises(StoreError) as caught:
        resolve(name)
    assert name in str(caught.value)
    assert f"hf download {name}" in str(caught.value)


def test_a_reference_to_a_snapshot_that_is_gone(cache: Path) -> None:
    (cache / "models--org--name" / "refs" / "main").write_text("f" * 40)
    with pytest.raises(StoreError, match="hf download org/name"):
        resolve("org/name")


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert resolve("~/org") == tmp_path / "org"
    assert resolve("org/name") == Path("org/name"), "a folder comes before a hub id"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/where", "does not exist. Give a folder"),
        ("./nowhere", "does not exist. Give a folder"),
        ("nowhere", "does not exist. Give a folder"),
        ("a/b/c", "does not exist. Give a folder"),
        ("~nobody-of-that-name/model", "Give the folder's whole path"),
        ("model.gguf", "does not exist (mhaffn pack model.gguf DST"),
        ("file.GGUF", "is a GGUF file: make a store of it first (mhaffn pack"),
        ("file", "is a file. Give a folder"),
    ],
)
def test_what_is_no_folder(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("file.GGUF").touch()
    with pytest.raises(StoreError) as caught:
        resolve(name)
    assert words in str(caught.value)
    assert Path(name).name in str(caught.value)

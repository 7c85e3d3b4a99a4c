"""Stores whose files lie in several folders: one store to whoever opens it, and never a mix of two packs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from mhaffn.config import ModelConfig, Sublayer, order
from mhaffn.errors import ConfigError, StoreError
from mhaffn.formats import PLAIN
from mhaffn.store import PackProgress, Store, pack, resolve
from mhaffn.store.places import Placement
from mhaffn.store.source import tensors_by_file
from tests.store.killed import pack_and_die
from tests.store.models import CONFIG, hashes, write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "source", dtype=torch.bfloat16)
    return tmp_path / "source"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_each_kind_in_a_folder_of_its_own(source: Path, tmp_path: Path) -> None:
    store = pack(source, tmp_path / "store", mha_dir=tmp_path / "a", ffn_dir=tmp_path / "b")
    assert names(tmp_path / "a") == {"layer-000-mha.safetensors", "layer-001-mha.safetensors"}
    assert names(tmp_path / "b") == {"layer-000-ffn.safetensors", "layer-001-ffn.safetensors"}
    for sublayer, records in store.sublayers.items():
        folder = tmp_path / ("a" if sublayer.kind == "mha" else "b")
        assert all(Path(tensor.path).resolve().parent == folder for tensor in records.tensors)
    assert not (tmp_path / "store" / "resident.safetensors").is_symlink()
    assert list(store.places()) == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("kind", ["mha", "ffn"])
def test_one_kind_elsewhere_the_other_stays(kind: str, source: Path, tmp_path: Path) -> None:
    store = pack(source, tmp_path / "store", **{f"{kind}_dir": tmp_path / "a"})
    links = {path.name for path in store.path.iterdir() if path.is_symlink()}
    assert links == names(tmp_path / "a") == {f"layer-00{n}-{kind}.safetensors" for n in (0, 1)}


def test_a_placed_store_holds_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "whole")
    for number, places in enumerate(
        ({"mha_dir": "a"}, {"mha_dir": "a", "ffn_dir": "a"}, {"stripe": ["a", "b", "c"]}, {"stripe": ["a", "store"]})
    ):
        folder = tmp_path / str(number)
        asked: dict[str, Any] = {
            name: [folder / f for f in value] if isinstance(value, list) else folder / str(value)
            for name, value in places.items()
        }
        pack(source, folder / "store", **asked)
        assert hashes(folder / "store") == hashes(tmp_path / "whole")
        shutil.copytree(folder / "store", folder / "copy", symlinks=False)
        shutil.rmtree(folder / "a")
        assert Store.open(folder / "copy").packed, "copied with links followed it is whole"


@torch.no_grad()
def test_transformers_opens_a_placed_store(tiny_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model()
    pack(folder, tmp_path / "store", mha_dir=tmp_path / "a", ffn_dir=tmp_path / "b")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "store").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("ffn", [16, 48, 512])
def test_a_stripe_gives_each_folder_the_same_bytes_at_any_point_of_a_pass(count: int, ffn: int, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(CONFIG | {"num_hidden_layers": 40, "intermediate_size": ffn})
    folders = [tmp_path / str(number) for number in range(count)]
    contents = [
        (name, key, {weight: PLAIN.parts(shape, "bfloat16") for weight, shape in shapes.items()})
        for name, key, shapes in tensors_by_file(config)
    ]
    files = Placement.of(tmp_path / "store", None, None, folders).files(contents)
    assert [file.key for file in files] == [*(s.key for s in order(40)), "resident"]
    assert files.pop().folder == tmp_path / "store"
    largest = max(file.nbytes for file in files)
    got = dict.fromkeys(folders, 0)
    for file in files:
        got[file.folder] += file.nbytes
        assert max(got.values()) - min(got.values()) <= largest


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"stripe": ["a"]}, "expected two folders or more"),
        ({"stripe": ["a", "b", "a"]}, "all different"),
        ({"stripe": ["a", "b/../a"]}, "all different"),
        ({"stripe": ["a", "b"], "mha_dir": "c"}, "--stripe beside --mha-dir or --ffn-dir"),
    ],
)
def test_folders_that_contradict_each_other(places: dict[str, Any], words: str, source: Path, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        pack(source, tmp_path / "store", **places)
    assert names(tmp_path) == {"source"}


def test_folders_that_must_not_get_weights(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, words in (
        (source, "is the source"),
        (tmp_path / "store" / "mha", "lies inside the store"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(StoreError, match=words):
            pack(source, tmp_path / "store", mha_dir=folder)
    assert names(tmp_path) == {"source", "file"}
    with pytest.raises(StoreError, match=r"/proc/mhaffn.*Give a"):
        pack(source, tmp_path / "store", mha_dir="/proc/mhaffn")


def test_a_placed_folder_may_hold_other_things_but_nothing_in_the_way(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "lost+found").mkdir(parents=True)
    pack(source, tmp_path / "first", mha_dir=disk)
    before = hashes(disk)
    with pytest.raises(StoreError, match=r"layer-000-mha.safetensors is in the way: another pack wrote it. Give anoth"):
        pack(source, tmp_path / "second", mha_dir=disk)
    with pytest.raises(StoreError, match="is in the way"):
        pack(source, tmp_path / "second", stripe=[disk, tmp_path / "b"])
    assert hashes(disk) == before
    assert not (tmp_path / "second").exists(), "a refused pack leaves nothing behind"
    pack(source, tmp_path / "second", ffn_dir=disk)
    assert Store.open(tmp_path / "first").packed and Store.open(tmp_path / "second").packed


def half_packed(source: Path, target: Path, **places: Any) -> None:
    """A pack with some files done and some not."""
    assert pack_and_die(source, target, 36, **places)
    assert any(path.is_symlink() for path in target.iterdir())
    assert not (target / "config.json").exists()


def test_going_on_with_other_folders_is_refused(source: Path, tmp_path: Path) -> None:
    target, a, b = tmp_path / "store", tmp_path / "a", tmp_path / "b"
    half_packed(source, target, stripe=[a, b])
    before = hashes(tmp_path)
    for other in (
        {},
        {"stripe": [b, a]},
        {"stripe": [a, tmp_path / "c"]},
        {"mha_dir": a, "ffn_dir": b},
        {"stripe": [a, b, tmp_path / "c"]},
    ):
        with pytest.raises(StoreError) as caught:
            pack(source, target, **other)
        for words in (
            f"holds an unfinished pack into '{target}' with --stripe {a} {b}, got one",
            "Go on with the same",
        ):
            assert words in str(caught.value)
    assert hashes(tmp_path) == before
    pack(source, target, stripe=[a, b])


def test_placing_what_was_begun_in_one_folder_is_refused(source: Path, tmp_path: Path) -> None:
    assert pack_and_die(source, tmp_path / "store", 34)
    with pytest.raises(StoreError, match="an unfinished pack with all files in its own folder, got one into"):
        pack(source, tmp_path / "store", mha_dir=tmp_path / "a")
    pack(source, tmp_path / "store")


def test_two_unfinished_packs_never_share_a_folder(source: Path, tmp_path: Path) -> None:
    half_packed(source, tmp_path / "first", mha_dir=tmp_path / "disk")
    before = hashes(tmp_path / "disk")
    for places in ({"mha_dir": tmp_path / "disk"}, {"ffn_dir": tmp_path / "disk"}):
        with pytest.raises(StoreError, match=r"files of another unfinished pack, into '.*first'. Finish that one"):
            pack(source, tmp_path / "second", **places)
    with pytest.raises(StoreError, match="unfinished pack"):
        pack(source, tmp_path / "disk")
    assert hashes(tmp_path / "disk") == before
    pack(source, tmp_path / "first", mha_dir=tmp_path / "disk")
    assert "mhaffn-pack.json" not in names(tmp_path / "disk")


def test_beginning_again_where_only_the_store_was_removed(source: Path, tmp_path: Path) -> None:
    """What lies in the other folders is of the same source, dtype and place: it is used."""
    half_packed(source, tmp_path / "store", mha_dir=tmp_path / "a")
    shutil.rmtree(tmp_path / "store")
    pack(source, tmp_path / "whole")
    pack(source, tmp_path / "store", mha_dir=tmp_path / "a")
    assert hashes(tmp_path / "store") == hashes(tmp_path / "whole")
    assert "mhaffn-pack.json" not in names(tmp_path / "a")


def test_a_disk_that_is_gone_when_a_pack_goes_on(source: Path, tmp_path: Path) -> None:
    half_packed(source, tmp_path / "store", mha_dir=tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(StoreError, match=r"layer-000-mha.safetensors is gone.*Mount its disk again"):
        pack(source, tmp_path / "store", mha_dir=tmp_path / "disk")
    assert not (tmp_path / "disk").exists()
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert pack(source, tmp_path / "store", mha_dir=tmp_path / "disk").packed


def test_a_disk_that_is_gone_when_a_store_is_opened(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "store", ffn_dir=tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=rf"is a link to '{tmp_path}/disk/layer-000-ffn.*Mount the disk it lies on"):
        Store.open(tmp_path / "store")
    for path in (tmp_path / "elsewhere").iterdir():  # as the format's page tells to move a part
        link = tmp_path / "store" / path.name
        link.unlink()
        link.symlink_to(path)
    assert list(Store.open(tmp_path / "store").places()) == [tmp_path / "store", tmp_path / "elsewhere"]


def test_links_to_what_is_no_regular_file_are_refused(source: Path, tmp_path: Path) -> None:
    store = pack(source, tmp_path / "store", mha_dir=tmp_path / "a")
    link = Path(store.sublayers[Sublayer(1, "mha")].tensors[0].path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("secret")
    for place in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "text", link):
        link.unlink()
        link.symlink_to(place)
        with pytest.raises(StoreError) as caught:
            Store.open(tmp_path / "store")
        assert str(link) in str(caught.value) and "secret" not in str(caught.value)


def test_a_placed_folder_in_use_by_another_pack(source: Path, tmp_path: Path) -> None:
    half_packed(source, tmp_path / "store", mha_dir=tmp_path / "a")
    with (tmp_path / "a" / "mhaffn-pack.json").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=f"{tmp_path / 'a'} is being written by another pack"):
            pack(source, tmp_path / "store", mha_dir=tmp_path / "a")
    pack(source, tmp_path / "store", mha_dir=tmp_path / "a")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b'{"places": {"mha": "x"}}', b'{"store": "\\u001b[2J"}'])
def test_a_garbled_state_is_another_pack(content: bytes, source: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "store", tmp_path / "a"):
        folder.mkdir(exist_ok=True)
        (folder / "mhaffn-pack.json").write_bytes(content)
        with pytest.raises(StoreError, match="unfinished") as caught:
            pack(source, tmp_path / "store", mha_dir=tmp_path / "a")
        assert str(caught.value).isprintable()
        with pytest.raises(StoreError, match=r"is an unfinished pack\. Run the same `mhaffn pack` again") as caught:
            resolve(folder)
        assert str(caught.value).isprintable()
        shutil.rmtree(folder)


def test_a_state_torn_by_a_kill_is_written_again(source: Path, tmp_path: Path) -> None:
    half_packed(source, tmp_path / "store", mha_dir=tmp_path / "a")
    content = (tmp_path / "store" / "mhaffn-pack.json").read_bytes()
    for kept in (0, 1, len(content) // 2, len(content) - 1):
        for folder in (tmp_path / "store", tmp_path / "a"):
            shutil.rmtree(folder)
            folder.mkdir()
        (tmp_path / "store" / "mhaffn-pack.json").write_bytes(content[:kept])
        assert pack(source, tmp_path / "store", mha_dir=tmp_path / "a").packed


def test_room_is_asked_for_on_each_device(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of one device share its room; a device that lacks it is named with its folders alone."""
    usage, devices = namedtuple("usage", "total used free"), {"a": 1, "b": 2, "c": 2}
    monkeypatch.setattr("mhaffn.store.claim.device_of", lambda folder: devices.get(folder.name, 0), raising=True)
    free = {"store": 1 << 40, "a": 1 << 40, "b": 64 << 20, "c": 64 << 20}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free[Path(path).name]))
    stripe = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    with pytest.raises(StoreError, match=rf"{stripe[1]}, {stripe[2]}: got 64.00 MiB free, expected 64\.\d+ MiB"):
        pack(source, tmp_path / "store", stripe=stripe)
    assert not any(folder.exists() for folder in (*stripe, tmp_path / "store"))
    free |= {"b": 65 << 20, "c": 65 << 20}
    assert pack(source, tmp_path / "store", stripe=stripe).packed


def test_an_unfinished_pack_tells_the_command_that_goes_on(source: Path, tmp_path: Path) -> None:
    target, folder = tmp_path / "my store", tmp_path / "größer"
    half_packed(source, target, ffn_dir=folder)
    for place in (target, folder):
        for opening in (Store.open, resolve):
            with pytest.raises(StoreError) as caught:
                opening(place)
            expected = f"mhaffn pack {source} '{target}' --dtype bfloat16 --ffn-dir '{folder}'"
            assert f"is an unfinished pack. `{expected}` goes on from there." in str(caught.value)


def test_a_source_that_moved_goes_on(source: Path, tmp_path: Path) -> None:
    half_packed(source, tmp_path / "store", mha_dir=tmp_path / "a")
    source.rename(tmp_path / "moved")
    assert pack(tmp_path / "moved", tmp_path / "store", mha_dir=tmp_path / "a").packed


def test_a_finished_store_is_refused_before_the_source_is_read(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "store")
    seen: list[PackProgress] = []
    with pytest.raises(
        StoreError, match=r"holds a finished store. Check it with `mhaffn verify .*store`. To pack once"
    ):
        pack(tmp_path / "no such source.gguf", tmp_path / "store", progress=seen.append)
    assert not seen


def test_the_manifest_is_the_same_wherever_files_lie(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "store", stripe=[tmp_path / "a", tmp_path / "b"])
    manifest = json.loads((tmp_path / "store" / "mhaffn.json").read_text())
    assert set(manifest) == {"version", "dtype", "source", "checksums"}

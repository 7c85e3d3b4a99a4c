"""Verifying a store: every damage is named, wherever it is, and nothing else is."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhaffn.verify
from mhaffn.errors import ConfigError, ReadError, ReadTimeoutError, StoreError
from mhaffn.reader import Reader
from mhaffn.store import pack
from mhaffn.verify import verify
from tests.store.killed import pack_and_die
from tests.store.models import write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "source", dtype=torch.bfloat16)
    return tmp_path / "source"


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    return pack(source, tmp_path / "packed").path


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_a_whole_store_is_read_once(engine: Any, packed: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(packed, engine=engine, progress=lambda done, total: seen.append((done, total)))
    assert found.ok and found.checksums and not found.damages and found.parts == 5
    weights = sum(path.stat().st_size - 4096 for path in packed.glob("*.safetensors"))
    assert seen[-1] == (weights, weights)
    assert found.reader is not None and found.bytes_read == found.reader.bytes_read >= weights
    assert "all 5 parts are as they were packed" in found.summary()
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


@pytest.mark.parametrize("piece_bytes", [4096, 8192, 1 << 20])
@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_any_flipped_bit_is_found(where: str, piece_bytes: int, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mhaffn.verify, "PIECE_BYTES", piece_bytes)
    for path in sorted(packed.glob("*.safetensors")):
        size = path.stat().st_size
        offset = {"first": 4096, "last": size - 1, "middle": (size + 4096) // 2}[where]
        flip(path, offset)
        (damage,) = verify(packed).damages
        assert (damage.file, damage.error) == (str(path), "ChecksumError")
        assert damage.got != damage.expected and damage.got in damage.message and damage.expected is not None
        assert f"{damage.expected}. Pack the model again." in damage.message
        flip(path, offset)
    assert verify(packed).ok


def test_every_damage_is_named_in_pass_order(source: Path, tmp_path: Path) -> None:
    store = pack(source, tmp_path / "store", mha_dir=tmp_path / "a", ffn_dir=tmp_path / "b").path
    flip(tmp_path / "a" / "layer-001-mha.safetensors", 5000)
    (tmp_path / "a" / "layer-000-mha.safetensors").unlink()
    os.truncate(tmp_path / "b" / "layer-000-ffn.safetensors", 5001)
    with (tmp_path / "b" / "layer-001-ffn.safetensors").open("ab") as file:
        file.write(b"more")
    flip(store / "resident.safetensors", 4097)
    found = verify(store)
    assert [(d.part, d.layer, d.kind, d.error) for d in found.damages] == [
        ("layer 0 mha", 0, "mha", "StoreError"),
        ("layer 0 ffn", 0, "ffn", "TruncatedFileError"),
        ("layer 1 mha", 1, "mha", "ChecksumError"),
        ("layer 1 ffn", 1, "ffn", "CorruptFileError"),
        ("the resident part", None, None, "ChecksumError"),
    ]
    assert [Path(d.file).name for d in found.damages] == [
        "layer-000-mha.safetensors", "layer-000-ffn.safetensors", "layer-001-mha.safetensors",
        "layer-001-ffn.safetensors", "resident.safetensors",
    ]  # fmt: skip
    size = 4096 + 3 * 32 * 48 * 2 + 32 * 2
    assert [(d.got, d.expected) for d in found.damages[:2]] == [("no file", "a file"), ("5001 bytes", f"{size} bytes")]
    assert f"got {size + 4} bytes, expected {size}" in found.damages[3].message
    assert "5 of 5 parts damaged" in found.summary()


def test_wrong_tensors_are_named(packed: Path) -> None:
    path = packed / "layer-000-mha.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path)
    assert "in float32, expected bfloat16" in verify(packed).damages[0].message
    tensors.pop("model.layers.0.self_attn.k_proj.weight")
    save_file(tensors, path)
    (damage,) = verify(packed).damages
    assert damage.part == "layer 0 mha" and "k_proj.weight" in damage.message


@pytest.mark.parametrize("name", ["mhaffn.json", "model.safetensors.index.json", "config.json"])
def test_a_store_whose_own_files_are_damaged(name: str, packed: Path) -> None:
    for content in (b"", b"{}", b"\xff"):
        (packed / name).write_bytes(content)
        found = verify(packed)
        assert not found.ok and found.damages[0].part == "the store"
        assert name in found.damages[0].message
    if name != "mhaffn.json":
        (packed / name).unlink()
        assert not verify(packed).ok


def test_a_store_whose_files_are_all_gone(packed: Path) -> None:
    for path in packed.glob("*.safetensors"):
        path.unlink()
    found = verify(packed)
    assert len(found.damages) == found.parts == 5 and {d.got for d in found.damages} == {"no file"}


def test_a_read_error_is_damage_and_the_rest_is_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Reader.submit

    class Failing:
        def wait(self) -> None:
            path = str(packed / "layer-000-ffn.safetensors")
            raise ReadError(f"{path}: Input/output error", op="read", path=path, offset=4096, length=4096, errno=5)

    def fail(self: Reader, extents: Any, slot: Any, slot_offset: int = 0) -> Any:
        failing = extents[0].path.endswith("layer-000-ffn.safetensors")
        return Failing() if failing else submit(self, extents, slot, slot_offset)

    monkeypatch.setattr(Reader, "submit", fail)
    flip(packed / "layer-001-ffn.safetensors", -1)
    first, second = verify(packed).damages
    assert (first.part, first.error) == ("layer 0 ffn", "ReadError") and "Input/output error" in first.message
    assert (second.part, second.error) == ("layer 1 ffn", "ChecksumError")


def lanes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mhaffn-verify")]


def test_a_disk_that_does_not_answer_ends_it(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def wait(self) -> None:
            raise ReadTimeoutError("no progress for 60 s", op="wait")

    monkeypatch.setattr(Reader, "submit", lambda *arguments: Silent())
    with pytest.raises(ReadTimeoutError):
        verify(packed)
    assert not lanes()


def test_an_interrupt_ends_it(packed: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(packed, progress=interrupt)
    assert not lanes()
    assert verify(packed).ok


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_without_checksums_gets_its_structure_checked(shards: int, tmp_path: Path) -> None:
    write_model(tmp_path, shards=shards)
    found = verify(tmp_path)
    assert found.ok and not found.checksums and found.reader is None and found.bytes_read == 0
    assert "no checksums here, so no weights were read; `mhaffn pack`" in found.summary()
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    os.truncate(path, path.stat().st_size - 1)
    found = verify(tmp_path)
    assert not found.ok and found.damages[0].error == "TruncatedFileError"
    assert "no weights were read" in found.summary()


def test_what_is_no_store_is_an_error(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a model folder"):
        verify(tmp_path / "empty")
    assert pack_and_die(source, tmp_path / "half", 30)
    with pytest.raises(StoreError, match="unfinished pack"):
        verify(tmp_path / "half")
    (source / "model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"holds neither model\.safetensors"):
        verify(source)
    with pytest.raises(ConfigError, match="psychic"):
        verify(packed, engine="psychic")  # type: ignore[arg-type]

"""Opening model folders: what Hugging Face writes, and what only looks like it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhaffn.config import Sublayer, order
from mhaffn.errors import (
    ConfigError,
    CorruptFileError,
    MhaffnError,
    StoreError,
    TruncatedFileError,
    UnsupportedModelError,
)
from mhaffn.formats import PLAIN
from mhaffn.store import Store, pack
from mhaffn.store.format import tensor_name
from tests.store.models import CONFIG, INDEX, random_weights, raw_safetensors, write_model

SINGLE = "model.safetensors"
FIRST_SHARD = "model-00001-of-00003.safetensors"


def refused(folder: Path, kind: type[MhaffnError], *words: str) -> None:
    """``folder`` does not open, for a reason that names it and all of ``words``."""
    with pytest.raises(kind) as caught:
        Store.open(folder)
    message = str(caught.value)
    for word in (str(folder), *words):
        assert word in message
    assert message.isprintable()
    assert len(message) < 2000


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_lies_where_the_store_says(shards: int, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = write_model(tmp_path, dtype=dtype, shards=shards)
    store = Store.open(tmp_path)
    assert (store.dtype, store.packed, store.resident_checksum) == (str(dtype).removeprefix("torch."), False, None)
    assert list(store.sublayers) == list(order(2))
    found = {t.name: t for records in store.sublayers.values() for t in records.tensors}
    found |= {tensor.name: tensor for tensor in store.resident.values()}
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        raw = Path(tensor.path).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert raw == weights[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert tensor.shape == tuple(weights[name].shape)
    for sublayer, records in store.sublayers.items():
        assert {record.name: record.values.name for record in records.records} == {
            weight: tensor_name(sublayer, weight) for weight in store.config.sublayer_shapes(sublayer.kind)
        }
        assert all(record.format == PLAIN for record in records.records)
        assert records.nbytes == sum(weights[tensor.name].nbytes for tensor in records.tensors)
        places = [(tensor.path, tensor.offset) for tensor in records.tensors]
        assert places == sorted(places), "records come in file order"


def test_what_transformers_saves_opens(tiny_model: Any) -> None:
    for folder in (
        tiny_model(),
        tiny_model(shards=3),
        tiny_model(kind="mistral"),
        tiny_model(tie_word_embeddings=True),
    ):
        store = Store.open(folder)
        assert len(store.sublayers) == 6
        assert ("head" in store.resident) is not store.config.tie_word_embeddings


def test_a_head_beside_tied_embeddings_is_used(tmp_path: Path) -> None:
    """transformers goes by the bytes too: a head that differs from the embedding is not tied to it."""
    write_model(tmp_path, tie_word_embeddings=True, weights=random_weights(CONFIG))
    store = Store.open(tmp_path)
    assert not store.config.tie_word_embeddings
    assert store.resident["head"].name == "lm_head.weight"


def test_a_shard_in_a_subfolder(tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    (tmp_path / "part").mkdir()
    (tmp_path / FIRST_SHARD).rename(tmp_path / "part" / "a b.safetensors")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = {n: "part/a b.safetensors" if s == FIRST_SHARD else s for n, s in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert any("part/a b.safetensors" in t.path for s in Store.open(tmp_path).sublayers.values() for t in s.tensors)


def test_the_only_file_may_have_any_name(tmp_path: Path) -> None:
    weights = write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "llama-fp32.safetensors")
    store = Store.open(tmp_path)
    assert {Path(tensor.path).name for tensor in store.resident.values()} == {"llama-fp32.safetensors"}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})  # beside one of that name others do not count
    store = Store.open(tmp_path)
    assert {Path(tensor.path).name for tensor in store.resident.values()} == {"model.safetensors"}


def test_several_files_of_other_names(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    (tmp_path / INDEX).unlink()
    with pytest.raises(StoreError, match=r"2 safetensors files: 'model-00001-of-00002.*Fetch the index"):
        Store.open(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()  # then it is taken for the whole
    with pytest.raises(CorruptFileError, match="got no tensor"):
        Store.open(tmp_path)


@pytest.mark.parametrize("kind", ["link", "loop", "folder", "pipe", "empty"])
def test_the_only_file_is_something_else(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "other.safetensors"
    match kind:
        case "link":
            path.symlink_to("gone")
        case "loop":
            path.symlink_to(path)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            path.touch()
    with pytest.raises(StoreError, match=r"other\.safetensors"):
        Store.open(tmp_path)


def test_tensors_no_one_asked_for_are_let_be(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "x": torch.ones(2, dtype=torch.int64)}
    write_model(tmp_path, weights=random_weights(CONFIG) | extra)
    assert Store.open(tmp_path).dtype == "float32"


def set_weight_map(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x",
        "/etc/passwd",
        "//etc/passwd",
        "",
        "a\\..\\b",
        "a\0b",
        "\ud800",
        "\x1b[2J",
        None,
        1,
        ["a"],
        {"a": 1},
    ],
)
def test_an_index_cannot_leave_its_folder(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, shards=3)
    save_file(random_weights(CONFIG), tmp_path / "x.safetensors")
    set_weight_map(folder, {"model.norm.weight": name})
    refused(folder, CorruptFileError, INDEX, "model.norm.weight", "expected", "Download the model again")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"{", b"\xff", b'{"weight_map": []}', b'{"weight_map": null}', b'{"weight_map": "a"}',
     b'{"weight_map": {"a": "b", "a": "c"}}', b"[" * 99999, b'{"weight_map": {}} x'],
)  # fmt: skip
def test_a_garbled_index(content: bytes, tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path, CorruptFileError, INDEX, "Download the model again")


def test_an_empty_weight_map(tmp_path: Path) -> None:
    write_model(tmp_path)
    set_weight_map(tmp_path, {})
    refused(tmp_path, CorruptFileError, "model.embed_tokens.weight", "Download")


@pytest.mark.parametrize("name", ["nowhere.safetensors", "a" * 300, "no/where", "."])
def test_a_shard_that_is_not_there(name: str, tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    set_weight_map(tmp_path, index | {"model.norm.weight": name})
    refused(tmp_path, StoreError, "etch")


def test_a_tensor_the_index_names_but_the_shard_lacks(tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    elsewhere = next(shard for shard in index.values() if shard != index["model.norm.weight"])
    set_weight_map(tmp_path, index | {"model.norm.weight": elsewhere})
    refused(tmp_path, CorruptFileError, "model.norm.weight", elsewhere, "Download")


def test_a_missing_tensor(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_model(tmp_path, weights=weights)
    refused(tmp_path, CorruptFileError, "model.layers.1.mlp.up_proj.weight", "[48, 32]", "Download")


@pytest.mark.parametrize("shape", [(48, 31), (32, 48), (48, 32, 1), (0,), ()])
def test_a_tensor_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_model(tmp_path, weights=random_weights(CONFIG) | {"model.layers.1.mlp.up_proj.weight": torch.ones(shape)})
    refused(tmp_path, CorruptFileError, "up_proj", f"{list(shape)}, expected [48, 32]", "Download")


def test_mixed_dtypes_name_the_way_out(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, torch.bfloat16)
    write_model(tmp_path, weights=weights | {"model.norm.weight": torch.ones(32)})
    refused(tmp_path, UnsupportedModelError, "BF16, F32", "mhaffn pack", "--dtype")
    assert Store.open(tmp_path, any_dtype=True).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_are_not_supported(dtype: torch.dtype, tmp_path: Path) -> None:
    write_model(tmp_path, dtype=dtype)
    refused(tmp_path, UnsupportedModelError, "expected all BF16", "Supported")
    with pytest.raises(UnsupportedModelError):
        Store.open(tmp_path, any_dtype=True)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_truncated_shard(shards: int, tmp_path: Path) -> None:
    write_model(tmp_path, shards=shards)
    path = tmp_path / (SINGLE if shards == 1 else FIRST_SHARD)
    os.truncate(path, path.stat().st_size - 5)
    refused(tmp_path, TruncatedFileError, str(path), "truncated", "Fetch")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX, "mhaffn.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling link", "unreadable link"])
def test_something_else_where_a_file_belongs(name: str, kind: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to("../nowhere")
    else:
        path.symlink_to(path)
    with pytest.raises(MhaffnError, match=str(path)):
        Store.open(tmp_path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    refused(tmp_path, ConfigError, "config.json does not exist", "mhaffn pack")
    refused(tmp_path / "nowhere", ConfigError, "config.json does not exist")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, StoreError, SINGLE, INDEX, "Download")
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "model.gguf").touch()
    refused(tmp_path, StoreError, "model.gguf", "mhaffn pack")


def test_a_zero_byte_in_the_folder_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Store.open(f"{tmp_path}/a\0b")


def test_a_shard_that_claims_the_moon(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    moon = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    (tmp_path / SINGLE).write_bytes(raw_safetensors({"model.norm.weight": moon}))
    refused(tmp_path, TruncatedFileError, str(2**42)[:6])


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_model(tmp_path / "source", dtype=torch.bfloat16)
    pack(tmp_path / "source", tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"version": None}, {"version": True}, {"version": "1"}, {"dtype": "float32"}, {"dtype": None},
     {"dtype": ["bfloat16"]}, {"checksums": {}}, {"checksums": []}, {"checksums": None}, {"checksums": {"0.mha": 1}},
     {"checksums": {"0.mha": "x" * 16}}, {"checksums": {"0.mha": "0" * 17}}],
)  # fmt: skip
def test_a_garbled_manifest(changes: dict[str, Any], packed: Path) -> None:
    values = json.loads((packed / "mhaffn.json").read_text())
    (packed / "mhaffn.json").write_text(json.dumps(values | changes))
    refused(packed, CorruptFileError, "expected", "ack")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"version": 1, "version": 1}'])
def test_a_manifest_that_is_no_json_object(content: bytes, packed: Path) -> None:
    (packed / "mhaffn.json").write_bytes(content)
    refused(packed, CorruptFileError, "mhaffn.json", "Pack the model again")


@pytest.mark.parametrize("key", ["0.mha", "1.ffn", "resident"])
def test_a_manifest_that_lacks_a_checksum(key: str, packed: Path) -> None:
    values = json.loads((packed / "mhaffn.json").read_text())
    del values["checksums"][key]
    (packed / "mhaffn.json").write_text(json.dumps(values))
    refused(packed, CorruptFileError, "mhaffn.json", key, "Pack the model again")


def test_without_its_manifest_a_packed_store_is_a_model_folder_still(packed: Path) -> None:
    (packed / "mhaffn.json").unlink()
    store = Store.open(packed)
    assert (store.packed, store.sublayers[Sublayer(0, "mha")].checksum) == (False, None)
    (packed / "layer-001-ffn.safetensors").unlink()
    refused(packed, StoreError, "layer-001-ffn.safetensors does not exist", "Fetch")


def test_a_packed_store_of_other_weights(packed: Path) -> None:
    path = packed / "layer-001-ffn.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    refused(packed, CorruptFileError, path.name, "in float32, expected bfloat16")

"""Packing: the same weights, whatever happens on the way; and never over something else."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from mhaffn.calibrate import importance_of
from mhaffn.config import order
from mhaffn.errors import ConfigError, CorruptFileError, MhaffnError, StoreError
from mhaffn.formats import Formats
from mhaffn.store import PackProgress, Store, pack
from mhaffn.store.safetensors import read_header
from tests.store.killed import pack_and_die
from tests.store.models import CONFIG, hashes, random_weights, write_model
from tests.test_evaluate import with_tokenizer

NAN_PATTERNS = torch.tensor([0x7FC1, 0xFFC2, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x7FA1], dtype=torch.int32).to(
    torch.uint16
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "source", dtype=torch.bfloat16)
    return tmp_path / "source"


def packed_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_keeps_its_bits(dtype: torch.dtype, shards: int, tied: bool, tmp_path: Path) -> None:
    weights = random_weights(CONFIG | {"tie_word_embeddings": tied}, dtype)
    if dtype == torch.bfloat16:  # not-a-numbers with payloads, infinities, a negative zero, a denormal
        weights["model.norm.weight"].view(torch.uint16)[: len(NAN_PATTERNS)] = NAN_PATTERNS
    write_model(tmp_path / "source", shards=shards, weights=weights, tie_word_embeddings=tied)
    store = pack(tmp_path / "source", tmp_path / "packed")
    found = packed_weights(tmp_path / "packed")
    assert found.keys() == weights.keys()
    assert all(found[name].dtype == dtype and bits(found[name]) == bits(weights[name]) for name in weights)
    assert store == Store.open(tmp_path / "packed")
    assert store.config == Store.open(tmp_path / "source").config
    assert store.packed


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"kind": "mistral"}, {"shards": 3}])
def test_transformers_opens_a_packed_store(options: dict[str, Any], tiny_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(dtype="bfloat16", **options)
    pack(folder, tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(folder)
    found, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(loading.values())
    assert type(found) is type(expected)
    assert found.dtype == torch.bfloat16
    assert found.config.to_dict() == expected.config.to_dict() | {"_name_or_path": found.config._name_or_path}
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.state_dict().items())


def test_a_head_beside_tied_embeddings_is_packed(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "source", tie_word_embeddings=True, weights=random_weights(CONFIG))
    pack(tmp_path / "source", tmp_path / "packed")
    assert torch.equal(packed_weights(tmp_path / "packed")["lm_head.weight"], weights["lm_head.weight"])
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["tie_word_embeddings"] is False


def test_layout_checksums_and_index(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    store = pack(source, target)
    manifest = json.loads((target / "mhaffn.json").read_text())
    assert (manifest["version"], manifest["dtype"], manifest["source"]) == (1, "bfloat16", "source")
    assert list(manifest["checksums"]) == [s.key for s in order(2)] + ["resident"]
    weight_map = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    for key, checksum in manifest["checksums"].items():
        name = "resident" if key == "resident" else "layer-{:03d}-{}".format(int(key.split(".")[0]), key.split(".")[1])
        path = target / f"{name}.safetensors"
        header = read_header(path)
        start = header.tensors[0].offset
        assert start % 4096 == 0
        assert xxhash.xxh3_64_hexdigest(path.read_bytes()[start:]) == checksum
        assert header.metadata == {"format": "pt", "xxh3_64": checksum}
        assert all(weight_map.pop(tensor.name) == path.name for tensor in header.tensors)
        ranks = [len(tensor.shape) for tensor in header.tensors]
        assert ranks == sorted(ranks, reverse=True), "matrices before norms"
    assert not weight_map
    assert {s.key: records.checksum for s, records in store.sublayers.items()} | {
        "resident": store.resident_checksum
    } == manifest["checksums"]
    assert not list(target.glob("*.partial"))
    assert not (target / "mhaffn-pack.json").exists()


def test_tokenizer_and_generation_files_come_along(source: Path, tmp_path: Path) -> None:
    wanted = (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "tokenizer.model",
        "chat_template.jinja",
    )
    for name in (*wanted, "merges.txt"):
        (source / name).write_text("{}")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "mhaffn-pack.jsonx"):
        (source / name).write_text("left out")
    (source / "folder.json").mkdir()
    os.mkfifo(source / "pipe.json")
    pack(source, tmp_path / "packed")
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert {*wanted, "merges.txt"} <= names
    assert not names & {"pytorch_model.bin", "pytorch_model.bin.index.json", "folder.json", "pipe.json"}


def test_text_in_the_config_stays_what_it_is(tmp_path: Path) -> None:
    """Half a surrogate pair too: JSON can have one, UTF-8 cannot."""
    text = "Läma 羊 🦙 \ud800"
    write_model(tmp_path / "source", note=text, **{text: [text]})
    pack(tmp_path / "source", tmp_path / "store")
    values = json.loads((tmp_path / "store" / "config.json").read_text(encoding="utf-8"))
    assert values["note"] == text and values[text] == [text]


def test_a_packed_store_packs_again_and_twice_the_same(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "a")
    pack(source, tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    pack(tmp_path / "a", tmp_path / "c")
    again = hashes(tmp_path / "a") | {"mhaffn.json": hashes(tmp_path / "c")["mhaffn.json"]}  # it names its source
    assert hashes(tmp_path / "c") == again


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_conversion(dtype: str, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()  # mixed, as many checkpoints are
    write_model(tmp_path / "source", weights=weights)
    store = pack(tmp_path / "source", tmp_path / "packed", dtype=dtype)
    assert store.dtype == dtype
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == dtype
    found = packed_weights(tmp_path / "packed")
    assert all(bits(found[name]) == bits(weights[name].to(getattr(torch, dtype))) for name in weights)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("float16", -1e30), ("bfloat16", 3.4e38)])
def test_overflow_is_refused(dtype: str, value: float, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan  # hides nothing
    write_model(tmp_path / "source", weights=weights)
    with pytest.raises(StoreError, match=rf"up_proj.weight overflows {dtype}. Pack with --dtype .*float32"):
        pack(tmp_path / "source", tmp_path / "packed", dtype=dtype)


def test_infinities_of_the_source_are_kept(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    write_model(tmp_path / "source", weights=weights)
    pack(tmp_path / "source", tmp_path / "packed", dtype="float16")
    assert packed_weights(tmp_path / "packed")["model.norm.weight"][:2].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", ["int8", "", "torch.float16", "Float16", ["float16"]])
def test_unknown_dtype(dtype: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of bfloat16, float16, float32"):
        pack(source, tmp_path / "packed", dtype=dtype)
    assert not (tmp_path / "packed").exists()


def test_progress_counts_up_to_the_whole(source: Path, tmp_path: Path) -> None:
    seen: list[PackProgress] = []
    pack(source, tmp_path / "packed", progress=seen.append)
    assert list(dict.fromkeys(p.file for p in seen))[:2] == ["layer-000-mha.safetensors", "layer-000-ffn.safetensors"]
    assert seen[-1].file == "done"
    done = [p.done_bytes for p in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == seen[0].total_bytes
    assert done[-1] >= sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors")) - 4096


Placing = Callable[[Path], dict[str, Any]]
"""The placement, and other options, of a pack whose folders lie in the one given."""


@contextmanager
def one_thread() -> Iterator[None]:
    """As in the process that is killed: another number may sum in another order, and calibrate to other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_killed(source: Path, folder: Path, steps: range, places: Placing) -> int:
    """Kills a pack before each of ``steps``, goes on, and compares with one never killed; says how many died."""
    pack(source, folder / "whole" / "store", **places(folder / "whole"))
    expected, killed = hashes(folder / "whole"), 0
    for step in steps:
        target = folder / str(step) / "store"
        placed = places(folder / str(step))
        if not pack_and_die(source, target, step, **placed):
            break
        killed += 1
        if (target / "mhaffn-pack.json").exists():
            with pytest.raises(StoreError, match="unfinished pack"):
                Store.open(target)
        if not (target / "mhaffn.json").exists() or (target / "mhaffn-pack.json").exists():
            pack(source, target, **placed)
        assert hashes(folder / str(step)) == expected, f"killed before step {step}"
        assert Store.open(target).sublayers.keys() == Store.open(folder / "whole" / "store").sublayers.keys()
        shutil.rmtree(folder / str(step))
    return killed


PLACEMENTS: dict[str, Placing] = {
    "together": lambda folder: {},
    "apart": lambda folder: {"mha_dir": folder / "a", "ffn_dir": folder / "b"},
    "striped": lambda folder: {"stripe": [folder / "a", folder / "store", folder / "b"]},
}


@pytest.mark.parametrize("places", PLACEMENTS)
def test_a_killed_pack_goes_on_and_ends_the_same(places: str, source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    assert check_killed(source, tmp_path, range(0, 400, 7), PLACEMENTS[places]) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACEMENTS)
def test_a_pack_killed_anywhere_goes_on_and_ends_the_same(places: str, source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    assert check_killed(source, tmp_path, range(400), PLACEMENTS[places]) >= 50


def calibrated(folder: Path, placement: Placing) -> tuple[Path, Placing]:
    """A source with a tokenizer, and packs of it in few bits whose scales are searched by what a text makes of them."""
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_model(folder / "model", dtype=torch.bfloat16, **widths)
    source = with_tokenizer(folder / "model", folder / "source", [f"w{i}" for i in range(58)])
    (folder / "text").write_text(" ".join(f"w{i * i % 58}" for i in range(80)))
    options = {
        "formats": Formats.parse(mha="int8", ffn="int4:64", layers=["1:ffn=int4:32:zeros"]), "device": "cpu",
        "importance": partial(importance_of, text=folder / "text", device="cpu"),
    }  # fmt: skip
    return source, lambda target: placement(target) | options


@pytest.mark.parametrize("places", PLACEMENTS)
def test_a_calibrated_pack_in_few_bits_killed_goes_on_and_ends_the_same(places: str, tmp_path: Path) -> None:
    source, placed = calibrated(tmp_path, PLACEMENTS[places])
    with one_thread():
        assert check_killed(source, tmp_path / "packs", range(3, 400, 29), placed) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACEMENTS)
def test_a_calibrated_pack_in_few_bits_killed_anywhere_goes_on_and_ends_the_same(places: str, tmp_path: Path) -> None:
    source, placed = calibrated(tmp_path, PLACEMENTS[places])
    with one_thread():
        assert check_killed(source, tmp_path / "packs", range(400), placed) >= 70


def test_a_pack_killed_again_and_again(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "whole")
    tries = 0
    while pack_and_die(source, tmp_path / "packed", 14):
        tries += 1
        assert tries < 30, "each try must get further"
    assert tries >= 2
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "whole")


def test_finished_files_are_not_written_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    assert pack_and_die(source, target, 30)
    finished = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert finished
    pack(source, target)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def begun(source: Path, target: Path) -> Path:
    """An unfinished pack of ``source``, with some files done."""
    assert pack_and_die(source, target, 30)
    return target


def test_another_model_or_dtype_cannot_go_on(source: Path, tmp_path: Path) -> None:
    target = begun(source, tmp_path / "packed")
    before = hashes(target)
    write_model(tmp_path / "other", dtype=torch.bfloat16, num_hidden_layers=1)
    for other, dtype in ((tmp_path / "other", None), (source, "float32")):
        with pytest.raises(
            StoreError, match="unfinished pack of another model, another dtype or other formats, or files that changed"
        ):
            pack(other, target, dtype=dtype)
    assert hashes(target) == before
    pack(source, target)


def test_a_source_that_changed_between_tries(source: Path, tmp_path: Path) -> None:
    target = begun(source, tmp_path / "packed")
    write_model(source, dtype=torch.bfloat16, weights=random_weights(CONFIG | {"seed": 1}, torch.bfloat16))
    with pytest.raises(StoreError, match="files that changed since"):
        pack(source, target)


def test_a_source_that_changes_during_a_pack(source: Path, tmp_path: Path) -> None:
    def touch(progress: PackProgress) -> None:
        if progress.file == "layer-001-mha.safetensors":
            os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(StoreError, match="changed while it was packed"):
        pack(source, tmp_path / "packed", progress=touch)
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "packed")


def test_a_source_that_vanishes_during_a_pack(source: Path, tmp_path: Path) -> None:
    def remove(progress: PackProgress) -> None:
        (source / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(StoreError, match=str(source / "model.safetensors")):
        pack(source, tmp_path / "packed", progress=remove)


def test_a_damaged_file_of_an_earlier_try(source: Path, tmp_path: Path) -> None:
    target = begun(source, tmp_path / "packed")
    first = target / "layer-000-mha.safetensors"
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    with pytest.raises(MhaffnError, match=r"layer-000-mha.safetensors is truncated"):
        pack(source, target)
    save_file({"a": torch.ones(1)}, first)
    with pytest.raises(CorruptFileError, match="Remove it and pack again"):
        pack(source, target)
    first.unlink()
    pack(source, target)
    assert first.read_bytes() == content


def test_two_packs_at_once(source: Path, tmp_path: Path) -> None:
    target = begun(source, tmp_path / "packed")
    with (target / "mhaffn-pack.json").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="being written by another pack"):
            pack(source, target)
    pack(source, target)


@pytest.mark.parametrize("what", ["a finished pack", "other files", "a model"])
def test_a_target_that_holds_something_else(what: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if what == "a finished pack":
        pack(source, target)
    elif what == "a model":
        write_model(target)
    else:
        target.mkdir()
        (target / "precious.txt").write_text("mine")
    before = hashes(target)
    with pytest.raises(StoreError, match="is not empty") as caught:
        pack(source, target)
    assert str(target) in str(caught.value)
    assert "ive a new folder" in str(caught.value)
    assert hashes(target) == before


def test_source_and_target_the_same(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    before = hashes(source)
    for target in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(StoreError, match=r"same folder. Give another target"):
            pack(source, target)
    assert hashes(source) == before


def test_a_target_below_the_source(source: Path) -> None:
    assert pack(source, source / "packed").packed
    assert not Store.open(source).packed


@pytest.mark.parametrize("path", ["file", "file/inside", "/proc/mhaffn", "/proc/self/mhaffn", "/sys/mhaffn/packed"])
def test_a_target_that_cannot_be_written(path: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError) as caught:
        pack(source, tmp_path / path)
    assert str(Path(path).parts[1 if path.startswith("/") else 0]) in str(caught.value)
    assert "Give a" in str(caught.value)


def test_no_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 5 << 20))
    with pytest.raises(StoreError, match=r"got 5.00 MiB free, expected 64\.\d\d MiB. Free some") as caught:
        pack(source, tmp_path / "packed")
    assert str(tmp_path / "packed") in str(caught.value)
    assert not (tmp_path / "packed").exists()
    monkeypatch.undo()
    assert pack(source, tmp_path / "packed").packed


def test_the_disk_runs_full_midway(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device.*the same command goes on"):
        pack(source, tmp_path / "packed")
    monkeypatch.undo()
    pack(source, tmp_path / "packed")
    pack(source, tmp_path / "whole")
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("path", ["nowhere", "nowhere.gguf", "file", "empty"])
def test_a_source_that_is_no_model(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(MhaffnError) as caught:
        pack(tmp_path / path, tmp_path / "packed")
    assert str(tmp_path / path) in str(caught.value)
    assert not (tmp_path / "packed").exists()

"""Streaming from where stores may lie: two devices, a read-only mount, any path, beside another process."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import mhaffn
from mhaffn.config import order
from mhaffn.errors import StoreError
from mhaffn.store import Store, pack
from mhaffn.verify import verify
from tests.conftest import Model
from tests.processes import as_an_interpreter, context

ODD_NAME = "a folder – with “spaces”, Umlauten äöü, 模型 and a 'quote'"


def tokens(folder: Path, **options: Any) -> list[int]:
    with mhaffn.load(folder, gpu=None, device="cpu", **options) as model:
        return generated(model)


def generated(model: mhaffn.StreamedLlama) -> list[int]:
    ids = torch.tensor([[5, 17, 101, 42, 9]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    result: list[int] = output[0].tolist()
    return result


def resident_tokens(folder: Path) -> list[int]:
    layers = Store.open(folder).config.num_layers
    return tokens(folder, dram=None, tiers=dict.fromkeys(order(layers), "dram"))


@pytest.fixture
def other_device(tmp_path: Path) -> Iterator[Path]:
    """A folder on another device than ``tmp_path``."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second device: /dev/shm cannot be written, or temporary files lie there too")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


@pytest.mark.parametrize("engine", ["auto", "threads"])
@pytest.mark.parametrize("how", ["kinds", "stripe"])
def test_a_store_on_two_devices_streams_from_both(
    how: str, engine: Any, tiny_model: Model, tmp_path: Path, other_device: Path
) -> None:
    source, here = tiny_model(num_hidden_layers=6), tmp_path / "here"
    if how == "kinds":
        store = pack(source, tmp_path / "store", mha_dir=other_device, ffn_dir=here)
    else:
        store = pack(source, tmp_path / "store", stripe=[here, other_device])
    lies = {sublayer: Path(records.tensors[0].path).resolve().parent for sublayer, records in store.sublayers.items()}
    assert set(lies.values()) == set(store.places()) == {here, other_device}
    with mhaffn.load(store.path, gpu=None, dram=None, device="cpu", engine=engine) as model:
        before = {device.device: device.bytes_read for device in model.runner.reader_info().devices}
        assert generated(model) == resident_tokens(source)
        devices = model.runner.reader_info().devices
        spans = [span for span in model.runner.trace.spans if span.lane == "ssd"]
    numbers = {f"{os.major(folder.stat().st_dev)}:{os.minor(folder.stat().st_dev)}" for folder in store.places()}
    assert {device.device for device in devices} == numbers
    for device in devices:
        assert device.bytes_read > before.get(device.device, 0)
    read = dict.fromkeys(store.places(), 0)
    for span in spans:
        read[lies[span.sublayer]] += span.nbytes
    assert all(nbytes >= 6 * store.places()[folder] for folder, nbytes in read.items()), "six passes, from both"
    assert verify(store.path).ok


def test_a_verification_reads_two_devices(tiny_model: Model, tmp_path: Path, other_device: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store", mha_dir=other_device)
    damaged = Path(store.sublayers[next(order(1))].tensors[0].path).resolve()
    assert damaged.parent == other_device
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    found = verify(store.path)
    assert [damage.part for damage in found.damages] == ["layer 0 mha"]
    assert found.reader is not None and len({device.device for device in found.reader.devices}) == 2


@contextmanager
def mounted(*command: str | Path) -> Iterator[None]:
    """Mounts for the length of a block, the last word being where; skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    ran = subprocess.run(["mount", *command], capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"cannot mount here: {ran.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", command[-1]], check=True)


def test_space_is_counted_on_each_device(tiny_model: Model, tmp_path: Path) -> None:
    """A mount of its own that is too small is named, and nothing is written to the other."""
    small = tmp_path / "small"
    small.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs", small):
        with pytest.raises(StoreError, match=rf"{small}: got \d.* free, expected 64\.\d+ MiB"):
            pack(tiny_model(), tmp_path / "store", ffn_dir=small)
        assert not list(small.iterdir()) and not (tmp_path / "store").exists()


def test_a_store_on_a_read_only_mount(tiny_model: Model, tmp_path: Path) -> None:
    disk, seen = tmp_path / "disk", tmp_path / "seen"
    seen.mkdir()
    store = pack(tiny_model(), disk / "store")
    with mounted("--bind", disk, seen):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(seen)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            (seen / "file").touch()
        assert tokens(seen / "store", dram=None) == resident_tokens(store.path)
        assert verify(seen / "store").ok
        for places in ({}, {"mha_dir": seen / "mha"}):
            with pytest.raises(StoreError, match=rf"{seen}.*Read-only file system. Give a folder that can be written"):
                pack(tiny_model(), (tmp_path / "new") if places else seen / "new", **places)


def test_any_path_will_do(tiny_model: Model, tmp_path: Path) -> None:
    folder = tmp_path / ODD_NAME
    store = pack(tiny_model(), folder / "store", mha_dir=folder / "mha dir", ffn_dir=folder / "ffn – dir")
    assert tokens(store.path, dram=None) == resident_tokens(tiny_model())
    assert verify(store.path).ok


def _stream(folder: Path, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu") as model:
        barrier.wait(60)  # both are loaded and prefetching
        results.put([generated(model) for _ in range(5)])


def test_two_processes_stream_one_store_at_once(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store", stripe=[tmp_path / "a", tmp_path / "b"])
    barrier, results = context.Barrier(2), context.Queue()
    work = (_stream, store.path, barrier, results)
    processes = [context.Process(target=as_an_interpreter, args=work) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found == [[resident_tokens(store.path)] * 5] * 2

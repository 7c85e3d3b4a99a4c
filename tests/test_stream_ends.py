"""Passes that end early – by errors, damaged files, interrupts, closing – and those that come after."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mhaffn
import mhaffn.runner
from mhaffn.config import Sublayer, order
from mhaffn.device import HostDevice
from mhaffn.errors import ChecksumError, PinnedMemoryError, ReadError, StreamError, TruncatedFileError
from mhaffn.plan import Tier, make_plan
from mhaffn.report import make_report
from mhaffn.store import Store, pack
from tests.conftest import Model
from tests.streaming import greedy, load_placed, resident_tokens


def test_a_pass_that_ends_early_starts_again_at_the_first_sublayer(tiny_model: Model) -> None:
    folder = tiny_model()
    expected = resident_tokens(folder)
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu") as model:
        for stop_at in (Sublayer(0, "ffn"), Sublayer(2, "mha")):
            fail_once_at(model, stop_at)
            with pytest.raises(ZeroDivisionError):
                greedy(model)
            assert greedy(model) == expected


@pytest.mark.parametrize("copies", [False, True])
def test_after_passes_that_failed_anywhere_memory_is_used_again_and_checked(
    copies: bool, tiny_model: Model, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if copies:
        request.getfixturevalue("copying")
    folder = tiny_model(hidden_size=576, intermediate_size=1024)
    expected = resident_tokens(folder)
    packed = pack(folder, tmp_path / "packed")
    with load_placed(packed.path, ("ssd", "ssd", "dram", "ssd", "gpu", "ssd"), device="cpu") as model:
        for sublayer in order(3):
            fail_once_at(model, sublayer)
            with pytest.raises(ZeroDivisionError):
                greedy(model)
            assert greedy(model) == expected
        report = make_report(model.runner.trace, "decode")
        assert report is not None and report.checks is not None
        streamed = sum(packed.sublayers[s].nbytes for s in model.runner.plan.streamed("ssd"))
        assert report.checks.nbytes == streamed, "all that was read for a pass, and once"
        info = model.runner.staging_info()
        assert info is not None and info.leaked_bytes == 0
        assert 0 < info.peak_leased_bytes <= model.runner.plan.staging_bytes
        with Path(packed.sublayers[Sublayer(2, "ffn")].tensors[0].path).open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(bytes(5))
        with pytest.raises(ChecksumError, match="layer 2 ffn"):
            greedy(model, 12)


@pytest.mark.parametrize("copies", [False, True])
def test_after_a_pass_that_came_to_nothing_streamed_the_trace_tells_right(
    copies: bool, tiny_model: Model, request: pytest.FixtureRequest
) -> None:
    if copies:
        request.getfixturevalue("copying")
    folder = tiny_model()
    expected = resident_tokens(folder)
    with load_placed(folder, ("gpu", "ssd", "dram", "ssd", "gpu", "ssd"), device="cpu") as model:
        assert greedy(model) == expected
        for _ in range(2):
            fail_once_at(model, Sublayer(0, "mha"))
            with pytest.raises(ZeroDivisionError):
                greedy(model)
        assert greedy(model) == expected
        trace = model.runner.trace
    numbers = [run.number for run in trace.passes]
    assert numbers == [*range(1, 7), *range(9, 15)]
    spans = {(span.lane, span.sublayer, span.number): span for span in trace.spans}
    for number, sublayer in itertools.product(numbers, model.runner.plan.streamed("ssd")):
        assert spans["ssd", sublayer, number].end_s <= spans[sublayer.kind, sublayer, number].start_s


def fail_once_at(model: mhaffn.StreamedLlama, sublayer: Sublayer) -> None:
    block = model.runner.blocks[sublayer.layer]
    module = block.mha if sublayer.kind == "mha" else block.ffn

    def fail(*_: Any) -> None:
        handle.remove()
        raise ZeroDivisionError

    handle = module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_file_that_shrinks_ends_the_run_and_the_next_model_works(
    engine: Any, tiny_model: Model, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model(dtype="bfloat16", hidden_size=576), tmp_path / "model")
    expected = resident_tokens(folder)
    path = folder / "model.safetensors"
    size, content = path.stat().st_size, path.read_bytes()
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", engine=engine) as model:
        assert greedy(model) == expected
        os.truncate(path, size // 2)
        with pytest.raises(TruncatedFileError, match=path.name) as caught:
            for _ in range(8):
                greedy(model)
        assert size // 2 <= caught.value.offset + 4096
        with pytest.raises(TruncatedFileError):
            greedy(model)
    path.write_bytes(content)
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", engine=engine) as model:
        assert greedy(model) == expected


def load_and_run(folder: Path, **options: Any) -> None:
    with mhaffn.load(folder, gpu=None, dram=None, **options) as model:
        greedy(model)


def test_a_flipped_bit_is_found_before_it_becomes_text(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store")
    path = Path(store.sublayers[Sublayer(1, "ffn")].tensors[0].path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for tiers in (None, dict.fromkeys(order(3), "dram")):
        with pytest.raises(ChecksumError, match=r"layer 1 ffn is damaged.*--no-verify"):
            load_and_run(store.path, device="cpu", tiers=tiers)
        load_and_run(store.path, device="cpu", tiers=tiers, verify=False)


def test_a_flipped_bit_in_the_embedding_is_found(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store")
    path = Path(store.resident["head"].path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match="the resident part is damaged"):
        load_and_run(store.path, device="cpu")


@pytest.mark.usefixtures("copying")
def test_a_flipped_bit_is_found_on_its_way_to_the_device(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "store")
    path = Path(store.sublayers[Sublayer(2, "mha")].tensors[0].path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 128
    path.write_bytes(content)
    for tiers in (None, dict.fromkeys(order(3), "gpu"), dict.fromkeys(order(3), "dram")):
        with pytest.raises(ChecksumError, match="layer 2 mha"):
            load_and_run(store.path, tiers=tiers)


def test_a_missing_file_is_named(tiny_model: Model, tmp_path: Path) -> None:
    store = pack(tiny_model(), tmp_path / "a folder with spaces – und Umlauten äöü")
    path = Path(store.sublayers[Sublayer(1, "mha")].tensors[0].path)
    with mhaffn.load(store.path, gpu=None, dram=None, device="cpu") as model:
        greedy(model)
    content = path.read_bytes()
    opened = Store.open(store.path)
    path.unlink()
    with pytest.raises(ReadError, match="layer-001-mha"):
        runner = mhaffn.runner.Runner(
            opened, make_plan(opened.config, "float32", copies=False), device=torch.device("cpu")
        )
        try:
            for _ in range(2):
                runner.sweep()
        finally:
            runner.close()
    path.write_bytes(content)


def test_two_passes_at_once_are_refused(tiny_model: Model) -> None:
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as model:
        entered, go_on = threading.Event(), threading.Event()

        def wait(*_: Any) -> None:
            entered.set()
            go_on.wait(20)

        model.runner.blocks[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=greedy, args=(model, 1))
        thread.start()
        assert entered.wait(20)
        with pytest.raises(StreamError, match="another pass is running"):
            greedy(model)
        go_on.set()
        thread.join()


def test_close_in_the_middle_of_a_pass_is_quick_and_final(tiny_model: Model) -> None:
    folder, before = tiny_model(), set(threading.enumerate())  # making a model starts a thread of tqdm's
    model = mhaffn.load(folder, gpu=None, dram=None, device="cpu")
    greedy(model, 1)
    assert set(threading.enumerate()) - before
    started = time.perf_counter()
    model.close()
    assert time.perf_counter() - started < 5
    assert not set(threading.enumerate()) - before


def test_a_close_that_was_interrupted_can_be_done_again(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = tiny_model(), set(threading.enumerate())
    model = mhaffn.load(folder, gpu=None, dram=None, device="cpu")
    greedy(model, 1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mhaffn.stream.threading.Thread.join", interrupted)
        model.close()
    with pytest.raises(StreamError, match="closed"):
        greedy(model, 1)
    model.close()
    model.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(PinnedMemoryError, match="closed"):
        model.runner.staging_info()


def sweep_until_error(model: mhaffn.StreamedLlama, errors: list[BaseException]) -> None:
    try:
        while True:
            model.runner.sweep()
    except BaseException as error:
        errors.append(error)


def test_close_during_a_pass_ends_it_with_an_error(tiny_model: Model) -> None:
    for wait_s in (0.0, 0.002, 0.01, 0.05):
        model = mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu")
        errors: list[BaseException] = []

        thread = threading.Thread(target=sweep_until_error, args=(model, errors))
        thread.start()
        time.sleep(wait_s)
        model.close()
        thread.join(10)
        assert not thread.is_alive()
        assert [type(error) for error in errors] == [StreamError]


@pytest.mark.parametrize("kind", ["mha", "ffn"])
def test_an_interrupt_between_two_steps_gives_no_wrong_weights(kind: Any, tiny_model: Model) -> None:
    """Where one kind streams, its neighbours have the same shapes: mixing them up would go unnoticed."""
    folder = tiny_model()
    expected = resident_tokens(folder)
    tiers: dict[Sublayer, Tier] = {s: "ssd" if s.kind == kind else "dram" for s in order(3)}
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", tiers=tiers) as model:
        stream = model.runner._stream
        wait = stream._await_arrival

        def interrupted() -> None:
            stream._await_arrival = wait  # type: ignore[method-assign]
            wait()
            raise KeyboardInterrupt

        for _ in range(2):
            stream._await_arrival = interrupted  # type: ignore[method-assign, assignment]
            with pytest.raises(KeyboardInterrupt):
                greedy(model)
            assert greedy(model) == expected


def test_an_interrupt_before_the_release_of_the_last_sublayer_blocks_no_later_pass(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next pass begins where the cycle stands, so that nothing is out of order."""
    folder = tiny_model()
    expected = resident_tokens(folder)
    tiers: dict[Sublayer, Tier] = {s: "ssd" if s == Sublayer(2, "ffn") else "dram" for s in order(3)}
    with mhaffn.load(folder, gpu=None, dram=None, device="cpu", tiers=tiers) as model:
        span = HostDevice.span

        def interrupted(device: HostDevice, lane: Any, sublayer: Sublayer, *options: Any) -> None:
            if sublayer == Sublayer(2, "ffn"):
                raise KeyboardInterrupt
            span(device, lane, sublayer, *options)

        for _ in range(4):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(HostDevice, "span", interrupted)
                greedy(model)
        results: list[list[int]] = []
        thread = threading.Thread(target=lambda: results.append(greedy(model)), daemon=True)
        thread.start()
        thread.join(20)
        assert results == [expected]


def test_a_forked_child_is_told_to_load_again(tiny_model: Model) -> None:
    with mhaffn.load(tiny_model(), gpu=None, dram=None, device="cpu") as model:
        greedy(model, 1)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                model.runner._stream.acquire(Sublayer(0, "mha"))
            except StreamError as error:
                code = 0 if "fork" in str(error) else 4
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        greedy(model, 2)

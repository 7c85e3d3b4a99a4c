"""`mhaffn bench` on this machine: a run's own figures, two runs, faults put in on purpose, and every way to end."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

import mhaffn.cli
from mhaffn import ops
from mhaffn.bench import document, files, session
from mhaffn.bench.compare import compare, regressions, remarks
from mhaffn.bench.links import open_links
from mhaffn.bench.passes import Executed, split_plan, whole_plan
from mhaffn.bench.read import Report
from mhaffn.errors import BudgetError, ConfigError, StoreError
from mhaffn.forecast import PHASES
from mhaffn.random_model import write_random_model
from mhaffn.reader import Reader
from mhaffn.store import Store
from tests.bench_reports import check_derived
from tests.processes import running
from tests.streaming import CopyingHost
from tests.test_bench_report import numbers

SETTINGS = session.Settings(shape="tiny", quick=True, seconds=4.0, tokens=64, device="cpu")
SLOWER = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def measure(folder: Path, **changes: Any) -> dict[str, Any]:
    return session.run(replace(SETTINGS, folder=folder, **changes), Console(stderr=True, quiet=True))


@pytest.fixture(scope="module")
def first(one_thread: None, folder: Path) -> dict[str, Any]:
    raw = measure(folder)
    assert list(folder.iterdir()) == []
    return raw


def test_a_run_says_what_it_did_and_what_it_left_out(first: dict[str, Any], tmp_path: Path) -> None:
    assert first["settings"]["rounds"] >= session.LEAST_ROUNDS
    assert {item["what"] for item in first["left_out"]} >= {"h2d_no_gpu", "quick"}
    assert first["memory"]["peak"]["dram"] <= first["memory"]["needed"]["dram"]
    assert all(len(rounds) == first["settings"]["rounds"] for rounds in first["measured"].values())
    paths = files.write(first, tmp_path, "en")
    assert {path.name for path in paths} == {
        "report.md", "report.json", "shares.png", "io.png", "timelines.png", "roofline.png"
    }  # fmt: skip
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "there is no GPU here" in text and "--quick" in text
    assert numbers(text) == numbers(document.write(Report.read(tmp_path / "report.json").raw, "zh", ["io"]))


def test_a_run_shows_how_far_it_is_with_the_time_left(one_thread: None, folder: Path) -> None:
    """Of everything that takes long: writing, warming up, measuring."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, color_system=None)
    raw = session.run(replace(SETTINGS, folder=folder, seconds=1.0), console)
    text = shown.getvalue()
    assert "writing random weights" in text and "warming up: " in text
    assert re.search(rf"measuring in {raw['settings']['rounds']} rounds, about \d+ s\n", text)
    assert re.search(r"\d+% \d+ s left, round \d+ of \d+: ", text)


def test_derived_figures_are_those_of_the_samples(first: dict[str, Any]) -> None:
    check_derived(first)


def test_the_same_again_differs_by_less_than_is_stated_or_says_why(first: dict[str, Any], folder: Path) -> None:
    before = first
    for _ in range(3):  # a burst of other work may fall into one run; where each pair differs, ± is too narrow
        after = measure(folder)
        found = compare(Report(before), Report(after))
        wrong = [item for item in found if item.apart and item.verdict != "machine"]
        if not wrong and not regressions(found, 0):
            break
        before = after
    assert regressions(found, 0) == [], [(item.name, item.change) for item in found]
    assert wrong == []
    assert remarks(Report(before), Report(after), found) or not any(item.apart for item in found)


def measure_until(first: dict[str, Any], folder: Path, expected: set[str]) -> tuple[dict[str, Any], set[str]]:
    """A run that tells what is expected to be worse, and all that it tells: on a busy machine it may take another."""
    for _ in range(3):
        second = measure(folder)
        worse = {item.name for item in regressions(compare(Report(first), Report(second)), 100)}
        if expected <= worse:
            return second, worse
    raise AssertionError(f"expected {expected} to be worse, got {worse}")


@pytest.mark.slow
def test_a_slowed_op_shows(first: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = ops.ffn

    def slowed(*arguments: torch.Tensor) -> torch.Tensor:
        for _ in range(SLOWER - 1):
            ffn(*arguments)
        return ffn(*arguments)

    monkeypatch.setattr("mhaffn.ops.ffn", slowed)
    second, worse = measure_until(first, folder, {"compute.prefill.ffn", "compute.decode.ffn"})
    assert not worse & {"compute.prefill.mha", "compute.decode.mha", "ssd.mha", "ssd.ffn"}
    share = [raw["derived"]["prefill.share.ffn"]["value"] for raw in (first, second)]
    assert share[1] > 1.2 * share[0]


@pytest.mark.slow
def test_a_throttled_reader_shows(first: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Reader.submit

    def throttled(self: Reader, *arguments: Any) -> Any:
        time.sleep(0.02)
        return submit(self, *arguments)

    monkeypatch.setattr(Reader, "submit", throttled)
    second, worse = measure_until(first, folder, {"ssd.mha", "ssd.ffn", "ssd.layer", "ssd.row"})
    assert not worse & {"compute.prefill.ffn", "compute.decode.ffn", "compute.prefill.mha"}
    assert second["derived"]["roof.ssd.ffn"]["value"] < 0.2


def test_copies_are_measured_as_the_stream_makes_them(tmp_path: Path) -> None:
    """Their timing on the CPU means nothing, their bytes do."""
    write_random_model(tmp_path, "tiny", 2, vocabulary=256)
    with open_links(Store.open(tmp_path), torch.device("cpu")) as links:
        weights = links.weights()
        assert all(samples > [0] for samples in (measurement.take(1) for measurement in links.h2d()))
    with safe_open(tmp_path / "layer-000-ffn.safetensors", "pt") as file:
        assert torch.equal(weights["ffn"].w2, file.get_tensor("model.layers.0.mlp.down_proj.weight"))


@pytest.mark.parametrize("copies", [False, True])
def test_whole_layers_compute_what_sublayers_do(copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies: as on a GPU, under the mode that a run is in."""
    if copies:
        monkeypatch.setattr("mhaffn.runner.open_device", lambda device, trace: CopyingHost(trace))
    write_random_model(tmp_path, "tiny", 2, vocabulary=256)
    store, device = Store.open(tmp_path), torch.device("cpu")
    plan = split_plan(store.config, 32, copies, 2)
    results = []
    for whole in (False, True):
        torch.manual_seed(0)
        with torch.inference_mode():
            opened = Executed.open(store, whole_plan(store.config, plan) if whole else plan, 32, device, whole=whole)
            results.append(opened.runner.forward(*opened.inputs["prefill"]))
            for measurement in opened.measurements("whole" if whole else "split"):
                assert all(ms > 0 for ms in measurement.take(2))
            short, long = (opened.timelines(dict.fromkeys(PHASES, ms)) for ms in (0.0, 1e9))
            assert set(short) == set(long) == set(PHASES)
            assert all("mha" in {span[0] for span in line["spans"]} for line in short.values())
            assert all(0 < short[phase]["window_ms"] < long[phase]["window_ms"] for phase in PHASES)
            between = {phase: long[phase]["window_ms"] - 1e-6 for phase in PHASES}
            nearest = opened.timelines(between)
            assert all(nearest[phase]["window_ms"] == long[phase]["window_ms"] for phase in PHASES)
            assert ("h2d" in {span.lane for span in opened.runner.trace.spans}) == copies
        opened.close()
    assert torch.equal(*results)


@pytest.mark.gpu
def test_on_a_gpu_copies_are_measured_and_memory_is_kept_to(folder: Path) -> None:
    raw = measure(folder, device=None, shape="llama3-8b", gpu="6GiB", dram="8GiB", seconds=10.0)
    assert raw["settings"]["device"] == "cuda" and raw["derived"]["roof.h2d.ffn"]["value"] > 0.5
    assert not {"h2d_no_gpu", "compute_without_graph"} & {item["what"] for item in raw["left_out"]}
    assert raw["memory"]["peak"]["gpu"] <= 6 << 30 and raw["memory"]["peak"]["dram"] <= 8 << 30


def test_an_error_on_the_way_leaves_nothing_behind(
    one_thread: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        assert any(folder.glob(".mhaffn-bench-*/layer-*"))
        raise OSError("a disk that fails")

    monkeypatch.setattr(Executed, "open", fail)
    with pytest.raises(OSError, match="a disk that fails"):
        measure(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_being_stopped_leaves_nothing_behind(stop: signal.Signals, tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    words = ("bench", "--shape", "tiny", "--quick", "--seconds", 60, "--folder", scratch, "--out", out)
    with running(*words) as process:
        process.until(lambda: any(scratch.glob("*/layer-001-ffn.safetensors")))
        process.send_signal(stop)
        assert process.wait(30) == 128 + stop, process.told
        assert "removed at the end" in process.told and "Traceback" not in process.told
        assert "interrupted" in process.told or stop != signal.SIGINT
    assert list(scratch.iterdir()) == []


def test_room_is_checked_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetError, match=r"--dram 64.00 MiB is too small: measuring this shape needs"):
        measure(folder, dram="64MiB")
    with pytest.raises(ConfigError, match="is no folder"):
        measure(tmp_path / "missing")
    with pytest.raises(ConfigError, match="the device is the CPU"):
        measure(folder, gpu="4GiB")
    full = os.statvfs_result((4096, 4096, 1000, 1000, 1000, 10, 10, 10, 0, 255))
    monkeypatch.setattr("os.statvfs", lambda path: full)
    with pytest.raises(StoreError, match=r"got 3.91 MiB of free space, need .* --folder"):
        measure(folder)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(folder: Path, *_: Any, **__: Any) -> None:
        (folder / "layer-000-ffn.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mhaffn.bench.session.write_random_model", fill)
    with pytest.raises(StoreError, match=rf"{folder}: No space left on device while .* --folder"):
        measure(folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_first(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="--out"), files.prepared(blocked / "out"):
        pass


def test_a_run_that_fails_leaves_no_empty_folder(tmp_path: Path) -> None:
    new, own, kept = tmp_path / "new", tmp_path / "own", tmp_path / "kept"
    own.mkdir()
    for out in (new, own, kept):
        with pytest.raises(KeyboardInterrupt), files.prepared(out):
            if out == kept:
                (out / "report.json").write_text("{}")
            raise KeyboardInterrupt
    assert not new.exists() and own.is_dir() and (kept / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama4"], "got llama4, expected llama3-70b, llama3-8b, seed, tiny, a model folder"),
        (["--seconds", "inf"], "got --seconds inf"),
        (["--fail-on-regression", "5"], "--fail-on-regression goes with --compare"),
        (["--lang", "fr"], "got --lang fr, expected one of en, zh"),
        (["--dram", "banana"], "got 'banana' as a size"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_folder_is_made(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = ["mhaffn", "bench", "--shape", "tiny", "--device", "cpu", "--folder", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, *arguments])
    with pytest.raises(SystemExit) as stop:
        mhaffn.cli.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_is_measured_by_its_config_alone(folder: Path, tmp_path: Path, one_thread: None) -> None:
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 300,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    raw = measure(folder, shape=str(tmp_path), seconds=1.0)
    assert raw["config"]["intermediate_size"] == 192 and raw["derived"]["decode.reached.split"]["value"] > 0


def test_a_sample_of_passes_reads_all_that_they_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first passes after a pause live on what was prefetched in it, and say nothing of the SSD."""
    write_random_model(tmp_path, "tiny", 2, vocabulary=256)
    store = Store.open(tmp_path)
    opened = Executed.open(store, split_plan(store.config, 32, False, 2), 32, torch.device("cpu"))
    needed, lead, seconds = opened.pass_bytes, 2.5, []
    assert needed == sum(records.nbytes for records in store.sublayers.values())
    info = opened.runner.reader_info()
    state = SimpleNamespace(read=0.0, lead=lead * needed)

    def forward(*_: object) -> None:
        used, state.lead = min(state.lead, needed * 0.8), max(0.0, state.lead - needed * 0.8)
        state.read += needed - used
        time.sleep((needed - used) / needed * 0.05)
        seconds.append((needed - used) / needed)

    monkeypatch.setattr(opened.runner, "forward", forward)
    monkeypatch.setattr(opened.runner, "reader_info", lambda: replace(info, bytes_read=int(state.read)))
    try:
        sample = opened._layer_ms("decode", 1)
    finally:
        opened.close()
    assert seconds[-1] == 1.0 and len(seconds) > 2
    assert sample == pytest.approx(50 / 2, rel=0.3)

"""mhaffn doctor: what it measures it says first, cleans up whatever happens, and plans find what it kept."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mhaffn.cli
from mhaffn.config import KINDS, Kind, ModelConfig
from mhaffn.errors import ReadError
from mhaffn.probe import _compute_s, measure
from mhaffn.profile import Profile, Widths
from mhaffn.store import Store
from tests.conftest import Model
from tests.processes import running

Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    """Runs the command in this process, with short measurements: exit code, standard output, standard error."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("mhaffn.probe.FILE_BYTES", 64 << 20)
    monkeypatch.setattr("mhaffn.probe.ROUND_S", 0.03)
    monkeypatch.setattr("mhaffn.probe.CACHES_BYTES", 1 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mhaffn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            mhaffn.cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_measured_once_planned_with_from_then_on(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    model, disk = tiny_model(), tmp_path / "a disk äöü"
    disk.mkdir()
    code, out, err = here("doctor", disk, "--measure", "--model", model, "--tokens", 8)
    assert code == 0, err
    assert f"writing 64.00 MiB to {disk}/.mhaffn-measure-" in err
    assert "left out: copies to a GPU" in err
    assert "computing FFN on 8 tokens on the CPU" in err
    assert f"kept in {tmp_path}/cache/mhaffn/profile.json, where `mhaffn plan` finds it" in err
    assert "→ host" in out and "FFN D 72 F 112" in out
    assert list(disk.iterdir()) == []

    kept = Profile.read(tmp_path / "cache" / "mhaffn" / "profile.json")
    assert kept.ssd > 1e6 and kept.h2d is None and kept.gpu_bytes is None and kept.dram_bytes > 0
    assert [(point.kind, point.tokens) for point in kept.compute] == [("mha", 1), ("mha", 8), ("ffn", 1), ("ffn", 8)]
    assert {point.widths for point in kept.compute} == {Widths.of(Store.open(model).config)}

    code, out, err = here("plan", model)
    assert code == 0, err
    assert f"{kept.describe()}: SSD {kept.ssd / 1e9:.1f} GB/s" in " ".join(out.split())
    code, out, _ = here("plan", model, "--ssd", "7GB")
    assert "given: --ssd: SSD 7.0 GB/s" in " ".join(out.split())
    code, out, _ = here("plan", model, "--gpu", "8GiB")
    assert "SSD and DRAM of" in " ".join(out.split())


def test_the_files_of_a_model_are_read_themselves(
    tiny_model: Model, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its widths are those measured."""
    monkeypatch.setattr("mhaffn.probe.FILE_BYTES_LEAST", 1 << 20)
    monkeypatch.setattr("mhaffn.probe.PIECE_BYTES", 1 << 20)
    folder = tiny_model(hidden_size=576, intermediate_size=1536)
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = here("doctor", folder, "--measure", "--tokens", 4, "--profile", tmp_path / "elsewhere.json")
    assert code == 0, err
    assert f"reading 1 files of {folder}" in err and "writing" not in err
    assert f"mhaffn plan MODEL --profile {tmp_path}/elsewhere.json" in err
    assert "MHA D 576 F 1536" in out
    assert sorted(path.name for path in folder.iterdir()) == before
    assert not (tmp_path / "cache").exists()
    code, out, err = here("plan", folder, "--profile", tmp_path / "elsewhere.json")
    assert code == 0 and "measured 20" in out, err
    code, out, err = here("plan", folder)
    assert code == 0 and "a typical machine" in out


def test_ctrl_c_while_reading_leaves_no_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with running("doctor", disk, "--measure", XDG_CACHE_HOME=str(tmp_path / "cache")) as process:
        process.until(lambda: "reading it" in process.told)
        assert len(list(disk.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130 and "Traceback" not in process.told
    assert list(disk.iterdir()) == [] and not (tmp_path / "cache").exists()


def test_ctrl_c_while_writing_leaves_no_file(tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def interrupted(_: int) -> None:
        written.extend(tmp_path.glob(".mhaffn-measure-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    code, _, _ = here("doctor", tmp_path, "--measure")
    assert code == 130 and len(written) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_measured_is_named(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    config = Store.open(tiny_model()).config
    with pytest.raises(ReadError, match="is no folder"):
        measure(tmp_path / "none", config, [4], print)
    code, _, err = here("doctor", tmp_path / "none", "--measure")
    assert code == 1 and "Traceback" not in err, "the examination fails first"


def test_a_full_disk_and_a_locked_one_are_named(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Store.open(tiny_model()).config
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    with pytest.raises(ReadError, match=r"cannot be written \(Permission denied\); give a folder that can"):
        measure(tmp_path, config, [4], lambda text: None)
    monkeypatch.setattr("mhaffn.probe.FILE_BYTES_LEAST", 1 << 62)
    with pytest.raises(ReadError, match="are free there, expected at least"):
        measure(tmp_path, config, [4], lambda text: None)


def refused(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_one_path_serves_the_disk_table_too(tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an argument, before or after the option."""
    asked = []
    monkeypatch.setattr("mhaffn.doctor.disk_table", lambda folder: asked.append(folder) or "a table")
    for arguments in ((tmp_path, "--disk"), ("--disk", tmp_path)):
        code, out, err = here("doctor", *arguments)
        assert code == 0, err
        assert "a table" in out and "O_DIRECT" in out
    assert asked == [tmp_path, tmp_path]


def test_a_profile_that_is_broken_is_named(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    path = tmp_path / "cache" / "mhaffn" / "profile.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 99}))
    code, _, err = here("plan", tiny_model())
    assert code == 2 and "mhaffn doctor --measure" in err and "profile.json" in err


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_made_before_compute_is_timed(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rand = [], torch.rand

    def counted(*size: object, **options: object) -> torch.Tensor:
        made.append(size)
        return rand(*size, **options)

    def timed(work: Callable[[], object], device: torch.device) -> float:
        before = len(made)
        for _ in range(20):  # more than there are sets
            work()
        assert len(made) == before
        return 1.0

    monkeypatch.setattr("torch.rand", counted)
    monkeypatch.setattr("mhaffn.probe._median_s", timed)
    config = ModelConfig("LlamaForCausalLM", 1, 64, 128, 4, 2, 16, 100, 1e-5, 512, False)
    assert _compute_s(kind, config, 1, 16, torch.device("cpu")) == 1.0
    assert len(made) > 8, "several sets, that no cache holds together"


def test_times_that_contradict_each_other_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("LlamaForCausalLM", 1, 64, 128, 4, 2, 16, 100, 1e-5, 512, False)
    monkeypatch.setattr("mhaffn.probe._ssd_speed", lambda folder, say: (1e9, True))
    for mha_s, told in (({1: 3.0, 8: 2.0}, True), ({1: 1.0, 8: 2.0}, False)):
        said: list[str] = []
        times = {"mha": mha_s, "ffn": {1: 1.0, 8: 1.0}}
        monkeypatch.setattr("mhaffn.probe._compute_s", lambda kind, _, n, *more, times=times: times[kind][n])
        measure(tmp_path, config, [8], said.append)
        assert any("MHA took longer on 1 than on 8 tokens" in text for text in said) == told

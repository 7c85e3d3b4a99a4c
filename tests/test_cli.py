"""The command as a person meets it: what it prints, how it fails, how Ctrl-C ends it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mhaffn.cli
from mhaffn.config import ModelConfig, order
from mhaffn.sizes import Sizes
from mhaffn.store import Store, pack
from tests.conftest import Model
from tests.processes import running
from tests.store.killed import pack_and_die

Here = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def model(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer: words w3 … w210 and a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    pack(tiny_model(), folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(211)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", pad_token="w2")
    tokenizer.chat_template = "w7 {{ messages[0]['content'] }} w8"
    tokenizer.save_pretrained(folder)
    return folder


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", "from mhaffn.cli import main; main()", *map(str, arguments)]
    figures = os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
    no_profile = {"XDG_CACHE_HOME": os.devnull, "MPLCONFIGDIR": figures}  # of this machine
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"} | no_profile | environment
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environ)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # no profile of this machine

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mhaffn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            mhaffn.cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, " ".join(err.split())

    return run


def test_run_prints_the_answer_to_stdout_and_the_table_to_stderr(model: Path, tmp_path: Path) -> None:
    trace, timeline = tmp_path / "trace.json", tmp_path / "timeline.png"
    done = command("run", model, "-p", "w5 w6", "--max-new-tokens", 6, "--dram", 0, "--trace", trace,
                   "--timeline", timeline, "--report")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(w\d+ ?){6}\n", done.stdout)
    assert "6 on SSD" in done.stderr
    for piece in ("prefill: 4 tokens in 1 pass", "decode: 5 tokens in 5 passes", "SSD → host", "busiest", "engine"):
        assert piece in done.stderr
    lanes = {event.get("args", {}).get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"ssd", "mha", "ffn"} <= lanes
    assert timeline.read_bytes().startswith(b"\x89PNG")


def test_run_ends_with_a_short_summary(model: Path, here: Here) -> None:
    code, _, err = here("run", model, "-p", "w5 w6", "--max-new-tokens", 6, "--dram", 0)
    assert code == 0
    assert re.search(r"prefill: 4 tokens, [\d.]+ tokens/s, [\d.]+ s a pass, SSD [\d.]+ GiB/s; busiest: ", err)
    assert re.search(r"decode: 5 tokens, .*engine (io_uring|threads), .*--report", err)
    assert "stopped at --max-new-tokens 6" in err


def test_a_prompt_may_look_like_an_option(model: Path, here: Here) -> None:
    code, _, err = here("run", model, "-p", "--debug", "--max-new-tokens", 2)
    assert code == 0 and "decode:" in err
    code, _, err = here("run", model / "missing", "-p", "w5", "--debug")
    assert code == 2 and "Traceback" in err


def test_a_blank_prompt_and_a_folder_for_a_file_are_refused(model: Path, here: Here, tmp_path: Path) -> None:
    code, _, err = here("run", model, "-p", " ")
    assert code == 2 and "empty prompt" in err
    code, _, err = here("run", model, "-p", "w5", "--trace", tmp_path)
    assert code == 2 and "it is a folder" in err


def test_plan_writes_json_to_stdout(model: Path, here: Here) -> None:
    code, out, err = here("plan", model, "--json", "-")
    assert code == 0 and "decode" in err
    assert next(item["name"] for item in json.loads(out)["forecasts"]) == "as it is"


def test_a_broken_profile_costs_the_prediction_alone(
    model: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mhaffn").mkdir()
    (tmp_path / "mhaffn" / "profile.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = here("run", model, "-p", "w5", "--max-new-tokens", 2, "--trace", tmp_path / "trace.json")
    assert code == 0 and out and "nothing predicted" in err and "decode:" in err
    assert (tmp_path / "trace.json").exists()


def test_a_tokenizer_of_another_model_is_told(model: Path, tmp_path: Path, here: Here) -> None:
    shutil.copytree(model, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    config["model"]["vocab"]["w9"] = 5000
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(config))
    code, _, err = here("run", tmp_path / "other", "-p", "w9")
    assert code == 2 and "got token 5000" in err and "the tokenizer that belongs to it" in err


def test_a_hub_id_is_packed(tiny_model: Model, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model(), snapshot)
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, _, err = here("pack", "org/name", tmp_path / "store")
    assert code == 0 and Store.open(tmp_path / "store").packed, err


def test_raw_leaves_out_the_chat_template(model: Path, here: Here) -> None:
    code, _, err = here("run", model, "-p", "w5 w6", "--max-new-tokens", 2, "--raw")
    assert code == 0 and "prefill: 2 tokens" in err


def test_prompt_from_stdin_and_sampling_with_a_seed(model: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for seed in (4, 4, 5):
        monkeypatch.setattr("sys.stdin", io.StringIO("w9 w10"))
        answers.append(here("run", model, "-p", "-", "--max-new-tokens", 8, "--temperature", 1.5, "--seed", seed)[1])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "/no/such/folder does not exist"),
        (["org/name"], "neither a folder nor a model in the local hub cache.*hf download org/name"),
        (["MODEL", "--dram", "1KiB"], "--dram 1.00 KiB is too small.*needs at least"),
        (["MODEL", "--dram", "many"], "'many' as a size"),
        (["MODEL", "--gpu", "1GiB"], "the device is the CPU"),
        (["MODEL", "--context", "3"], "prompt of 4 tokens, expected fewer in all than --context 3"),
        (["MODEL", "--engine", "psychic"], "psychic"),
        (["MODEL", "--device", "tpu"], "tpu"),
        (["MODEL", "--trace", "/no/such/folder/trace.json"], "/no/such/folder is no folder"),
        (["MODEL", "--timeline", "/no/such/folder/pass.png"], "/no/such/folder is no folder"),
        (["MODEL", "--trace", "-"], "standard output is taken"),
        (["MODEL", "--timeline", "pass.jpg"], r"ends in \.png"),
        (["MODEL", "--context", "100000"], "context 100000, expected at most"),
        (["MODEL", "--system", "caf\udce9"], "not UTF-8"),
    ],
)
def test_a_mistake_gets_one_paragraph_and_exit_2(arguments: list[str], message: str, model: Path, here: Here) -> None:
    words = [str(model) if argument == "MODEL" else argument for argument in arguments]
    code, out, err = here("run", *words, "-p", "w5 w6")
    assert code == 2 and out == ""
    assert "Traceback" not in err
    assert re.search(message, err)


def test_debug_shows_the_traceback(here: Here) -> None:
    code, _, err = here("run", "/no/such/folder", "-p", "x", "--debug")
    assert code == 2 and "Traceback" in err


def test_the_answer_stops_at_the_context(model: Path, here: Here) -> None:
    code, out, _ = here("run", model, "-p", "w5 w6", "--max-new-tokens", 1000, "--context", 9)
    assert code == 0 and len(out.split()) == 5


def test_a_read_error_in_the_middle_ends_with_an_error_not_with_text(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    subprocess.run(["cp", "-r", model, copy], check=True)
    with running("run", copy, "-p", "w5", "--max-new-tokens", 240, "--dram", 0) as process:
        process.until(lambda: len(process.printed) >= 8)
        os.truncate(copy / "layer-001-ffn.safetensors", 5000)
        assert process.wait() == 2
        assert "layer-001-ffn" in process.told and "Traceback" not in process.told


def test_ctrl_c_ends_with_the_summary(model: Path) -> None:
    with running("run", model, "-p", "w5", "--max-new-tokens", 250, "--dram", 0) as process:
        process.until(lambda: len(process.printed) >= 8)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130, process.told
        assert "interrupted" in process.told and "decode:" in process.told and "Traceback" not in process.told


def test_ctrl_c_in_the_first_pass_leaves_no_timeline(
    model: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mhaffn.hf.StreamedLlama.forward", interrupted)
    timeline = tmp_path / "pass.png"
    code, _, err = here("run", model, "-p", "w5", "--timeline", timeline)
    assert code == 130, err
    assert "interrupted" in err and "no timeline drawn: not one pass came to its end" in err
    assert not timeline.exists()


def test_a_file_that_cannot_be_written_is_told_before_long_work(
    model: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    monkeypatch.setattr("os.access", lambda asked, mode: (asked, mode) != (tmp_path, os.W_OK))
    code, out, err = here("run", model, "-p", "w5", "--trace", path)
    assert code == 2 and out == "" and f"{path} cannot be written: no permission" in err


def test_pack_writes_a_store_and_refuses_a_full_folder(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    code, _, err = here("pack", tiny_model(), tmp_path / "store", "--dtype", "bfloat16")
    assert code == 0 and "packed 6 sublayers, " in err and " (bfloat16), into " in err
    code, _, err = here("pack", tiny_model(), tmp_path / "store")
    assert code == 2 and "is not empty: it holds a finished store. Check it with `mhaffn verify" in err


def test_a_pack_stopped_by_ctrl_c_says_how_to_go_on(
    tiny_model: Model, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mhaffn import store

    whole = store.pack

    def stopped(*args: Any, progress: Any, **options: Any) -> Any:
        def stop(state: Any) -> None:
            raise KeyboardInterrupt

        return whole(*args, progress=stop, **options)

    monkeypatch.setattr(store, "pack", stopped)
    code, _, err = here("pack", tiny_model(), tmp_path / "store")
    assert code == 130 and "the same command goes on from here" in err
    monkeypatch.undo()
    code, _, err = here("pack", tiny_model(), tmp_path / "store")
    assert code == 0 and "packed 6 sublayers" in err


@pytest.mark.parametrize("spelling", ["one option", "an option each", "before"])
def test_pack_takes_folders_for_a_stripe(spelling: str, tiny_model: Model, tmp_path: Path, here: Here) -> None:
    a, b, where = tmp_path / "a", tmp_path / "b", (tiny_model(), tmp_path / "store")
    words = {
        "one option": [*where, "--stripe", a, b, "--dtype", "bfloat16"],
        "an option each": [*where, "--stripe", a, "--stripe", b, "--dtype", "bfloat16"],
        "before": ["--stripe", a, b, "--dtype", "bfloat16", *where],
    }[spelling]
    code, _, err = here("pack", *words)
    assert code == 0, err
    assert re.search(rf"packed 6 sublayers, .* in {a} .* in {b} folders on one device", err)
    assert len([*a.iterdir(), *b.iterdir()]) == 6


def test_pack_places_each_kind(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    code, _, err = here(
        "pack", tiny_model(), tmp_path / "store", "--mha-dir", tmp_path / "a", "--ffn-dir", tmp_path / "b"
    )
    assert code == 0, err
    assert {path.name[10:13] for path in (tmp_path / "a").iterdir()} == {"mha"}
    assert {path.name[10:13] for path in (tmp_path / "b").iterdir()} == {"ffn"}
    code, _, err = here("pack", tiny_model(), tmp_path / "other", "--stripe", tmp_path / "c")
    assert code == 2 and "expected two folders or more" in err


def test_run_on_an_unfinished_pack_tells_how_to_finish_it(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    assert pack_and_die(tiny_model(), tmp_path / "store", 20)
    for words in (("run", "-p", "w5"), ("plan",), ("verify",)):
        code, out, err = here(*words, tmp_path / "store")
        assert code == 2 and out == ""
        assert "is an unfinished pack. `mhaffn pack" in err and "goes on from there" in err


def test_verify_names_what_is_damaged(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    store = pack(tiny_model(), tmp_path / "store").path
    code, out, _ = here("verify", store, "--json", tmp_path / "found.json")
    assert code == 0 and "all 7 parts are as they were packed" in " ".join(out.split())
    assert json.loads((tmp_path / "found.json").read_text())["ok"] is True
    with (store / "layer-001-ffn.safetensors").open("r+b") as file:
        file.seek(8000)
        file.write(b"damage")
    (store / "layer-002-mha.safetensors").unlink()
    code, out, err = here("verify", store, "--json", "-")
    assert code == 1 and "Traceback" not in err
    found = json.loads(out)
    assert [(damage["layer"], damage["kind"]) for damage in found["damages"]] == [(1, "ffn"), (2, "mha")]
    assert re.search(r"damaged layer 1 ffn: .*layer-001-ffn.* got checksum \w{16}, expected \w{16}", err)
    assert re.search(r"damaged layer 2 mha: .*layer-002-mha.safetensors does not exist", err)
    assert "2 of 7 parts damaged" in err


def test_verify_of_a_folder_without_checksums_says_so(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    code, out, _ = here("verify", tiny_model())
    assert code == 0 and "no checksums here, so no weights were read" in " ".join(out.split())
    code, _, err = here("verify", tmp_path)
    assert code == 2 and "not a model folder" in err
    code, _, err = here("verify", tiny_model(), "--json", "/no/such/folder/found.json")
    assert code == 2 and "is no folder" in err


def test_doctor_tells_engine_memory_and_gpu(tmp_path: Path, here: Here) -> None:
    code, out, _ = here("doctor", tmp_path)
    for piece in ("engine", "O_DIRECT", "memlock", "huge pages", "GPU", "versions"):
        assert piece in out
    assert code == 0
    for option in (["--tokens", 64], ["--model", "llama3-8b"], ["--profile", tmp_path / "profile.json"]):
        code, _, err = here("doctor", tmp_path, *option)
        assert code == 2 and f"got {option[0]} without --measure" in err


def test_help_teaches(here: Here) -> None:
    assert "mhaffn doctor" in here("--help")[1]
    assert "Ctrl-C" in here("run", "--help")[1]
    assert "--stripe /mnt/a" in here("pack", "--help")[1]
    assert "Exits with 0" in here("verify", "--help")[1]
    assert here("--version")[1] == f"mhaffn {mhaffn.__version__}\n"


def test_an_unwritable_cache_is_named(tmp_path: Path, here: Here) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = here("demo", "--cache", blocked / "cache")
    assert code == 2 and "cannot be written" in err and "--cache" in err


def test_plan_needs_only_a_config(tmp_path: Path, here: Here) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = here("plan", tmp_path, "--dram", "64GiB", "--json", tmp_path / "plan.json")
    assert code == 0, err
    assert "bound by SSD" in out and "FFN in int4" in out
    assert "one token guessed right in each pass is 2× faster" in " ".join(out.split())
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["machine"]["figures"].startswith("a typical machine") and found["machine"]["dram_bytes"] == 64 << 30
    first = found["forecasts"][0]
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    code, out, err = here("plan", tmp_path, "--gpu", "20GiB", "--dram", "64GiB", "--json", "-")
    assert code == 0, err
    wide = json.loads(out)["forecasts"][0]["passes"]["decode"]["ssd_s"]
    assert wide > 2 * first["passes"]["decode"]["ssd_s"], "weights are streamed in the dtype that they have"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert first["gpu_bytes"] <= 16 << 30 and first["dram_bytes"] <= 64 << 30
    decode = first["passes"]["decode"]
    assert decode["seconds"] >= decode["bound_s"] * 0.999 > 5
    code, _, err = here("plan", tmp_path, "--gpu", "4GiB")
    assert code == 2 and "needs at least" in err
    for option in ("--context", "--prompt-tokens"):
        code, _, err = here("plan", tmp_path, option, 131073)
        assert code == 2 and "context of 131073, expected at most 131072" in err
    code, out, _ = here("plan", tmp_path, "--dram", "200GiB", "--ffn", "int4", "--mha", "int4", "--hbm", "10GB")
    assert code == 0 and "decode: bound by compute" in out and "guessed" not in out
    for speed, told in (
        ("5", "got --ssd of 5 bytes a second, expected a speed with its unit"),
        ("", "got --ssd '', expected a speed"),
    ):
        code, _, err = here("plan", tmp_path, "--ssd", speed)  # as of a variable that was never set
        assert code == 2 and told in err
    code, _, err = here("plan")
    assert code == 2 and "MODEL, or --measured" in err


def test_nothing_is_drawn_where_nobody_watches(model: Path, tmp_path: Path, here: Here) -> None:
    """An error in a log is one paragraph, and so is what was done."""
    for words in (("pack", tmp_path, tmp_path / "out"), ("run", model, "-p", "w5", "--dram", "1KiB")):
        code, _, err = here(*words)
        assert code == 2 and err.startswith("error: "), err
    code, _, err = here("verify", model)
    assert (code, err) == (0, "")
    code, _, err = here("pack", model, tmp_path / "out")
    assert code == 0 and err.startswith("packed "), err


def test_plan_knows_models_by_name(here: Here) -> None:
    """So that it can be tried before anything is fetched; what it does not know, it can be told with one small file."""
    code, out, err = here("plan", "llama3-70b", "--ssd", "5GB", "--dram", "64GiB")
    assert code == 0, err
    assert "160 sublayers" in out and "bound by SSD; all in int4 helps most, " in out
    code, _, err = here("plan", "llama4")
    assert code == 2 and "got llama4, expected llama3-70b, llama3-8b, seed, tiny, a model folder or a hub id" in err
    code, _, err = here("plan", "org/name")
    assert code == 2 and "Fetch config.json with: hf download org/name config.json" in err


def test_a_plan_of_a_small_model_has_digits(here: Here) -> None:
    code, out, err = here("plan", "tiny")
    assert code == 0, err
    base = next(line for line in out.splitlines() if line.startswith("as it is"))
    assert "0.00 " not in base and "none of these changes helps much" in out


def test_plan_of_measured_figures(here: Here) -> None:
    seed = Path(__file__).parent / "data" / "seed.json"
    code, out, _ = here("plan", "--measured", seed)
    assert code == 0
    for piece in ("391.88", "294.97", "1.33×", "193.24", "213.52", "1.01×", "104", "91", "F 28672"):
        assert piece in out
    for piece in ("0.281", "67%", "41.73", "4.38", "38.9%", "32.9%", "59.8%", "224.1×", "16.5×"):
        assert piece in out, "sizes, speeds, shares of the time of one step after the other, decode beside prefill"
    code, out, _ = here("plan", "--measured", seed, "--json", "-")
    values = json.loads(out)
    assert code == 0 and values["outlook"][0]["name"] == "all from SSD"
    decode = values["layers"]["decode"]
    assert decode["serial_ms"] == pytest.approx(215.77, abs=0.011)
    assert decode["sublayers"]["ffn"]["wait_ms"] == pytest.approx(140.97, abs=0.011)
    assert decode["steps_ms"]["FFN SSD"] == 129.01
    code, _, err = here("plan", "--measured", seed, "--gpu", "8GiB")
    assert code == 2 and "got --gpu beside --measured" in err


def test_pack_in_few_bits_says_what_it_wrote(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = tiny_model(**widths)
    code, _, err = here(
        "pack", source, tmp_path / "store", "--ffn", "int4:64", "--mha", "int8", "--layers", "0:ffn=plain"
    )  # fmt: skip
    assert code == 0, err
    assert "MHA: int8 in 12 matrices" in err and "FFN: int4:64 in 6 matrices, plain in 3 matrices" in err
    for words, message in [
        (("--ffn", "int4"), "expected a group that divides its 64 columns. Take int4:64."),
        (("--ffn", "int3"), "got format 'int3', expected plain, int8, int4, fp8"),
        (("--layers", "7=plain"), "expected layers from 0 to 2"),
        (("--calibrate", tmp_path / "none"), "expected a text file, or random for tokens drawn at random"),
        (("--calibrate", tmp_path), "expected a text file, or random for tokens drawn at random"),
        (("--calibrate", "x" * 300), "expected a text file, or random for tokens drawn at random"),
    ]:
        code, _, err = here("pack", source, tmp_path / "other", *words)
        assert code == 2 and message in err, err
    assert not (tmp_path / "other").exists()


def test_plan_compares_formats(tiny_model: Model, here: Here) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    code, out, err = here("plan", tiny_model(**widths), "--ffn", "int4:32", "--mha", "int8", "--dram", "0")
    assert code == 0, err
    for name in ("FFN in int8", "FFN in int4", "all in int8", "all in int4", "MHA int8, FFN int4:32"):
        assert name in out
    code, _, err = here("plan", tiny_model(**widths), "--ffn", "int4")
    assert code == 2 and "Take int4:64" in err


def test_plan_takes_a_packed_store_as_it_is(tiny_model: Model, tmp_path: Path, here: Here) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    source, target = tiny_model(dtype="bfloat16", **widths), tmp_path / "store"
    assert here("pack", source, target, "--ffn", "int8", "--mha", "int8")[0] == 0
    code, out, err = here("plan", target, "--gpu", "0", "--dram", "0", "--json", "-")
    assert code == 0, err
    now = json.loads(out)["forecasts"][0]
    half = Sizes(ModelConfig.from_folder(source), "bfloat16")
    names = [row["name"] for row in json.loads(out)["forecasts"]]
    assert "all in int4" in names and "all in int8" not in names  # only what makes it smaller
    nbytes = sum(records.nbytes for records in Store.open(target).sublayers.values())
    assert nbytes < 0.6 * sum(half.weights(s) for s in order(3))
    code, out, err = here("plan", source, "--gpu", "0", "--dram", "0", "--json", "-")
    assert (
        code == 0
        and now["passes"]["decode"]["ssd_s"] < 0.6 * json.loads(out)["forecasts"][0]["passes"]["decode"]["ssd_s"]
    )


def test_tokens_are_drawn_as_asked(model: Path, here: Here) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        return here("run", model, "-p", "w5 w9", "--max-new-tokens", "6", *words)

    code, greedy, err = run()
    assert code == 0, err
    hot = ("--temperature", "5")
    assert run(*hot, "--top-k", "1")[1] == greedy
    assert run(*hot, "--top-p", "0.01")[1] == greedy
    drawn = [run(*hot, "--seed", str(seed))[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    code, _, err = run("--top-p", "0.9", "--top-k", "3")
    assert code == 2 and "got --top-p and --top-k at a temperature of 0" in err


def test_a_system_prompt_goes_into_the_chat_template(model: Path, here: Here) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        return here("run", model, "--max-new-tokens", "4", *words)

    told = run("-p", "w9", "--system", "w5")  # this template takes the first message alone
    assert told[0] == 0 and told[1] == run("-p", "w5")[1]
    code, _, err = run("-p", "w9", "--system", "w5", "--raw")
    assert code == 2 and "got a system prompt, but --raw continues the text as it is" in err


def test_lookup_gives_the_same_answer_in_fewer_passes(model: Path, here: Here) -> None:
    words = ("run", model, "-p", "w5 w6 w5 w6", "--max-new-tokens", 40, "--dram", 0)
    code, plain, err = here(*words)
    assert code == 0 and "passes over the weights" not in err
    code, guessed, err = here(*words, "--lookup", 5)
    assert code == 0 and guessed == plain, err
    tokens, passes = map(int, re.search(r"(\d+) tokens in (\d+) passes over the weights", err).groups())
    assert tokens == 40 and 2 <= passes < 40
    prompt, decoded = (int(re.search(rf"{phase}: (\d+) tokens", err).group(1)) for phase in ("prefill", "decode"))
    assert prompt == 6 and 40 - 6 <= decoded < 40  # the pass of the prompt may have given more than one


def test_lookup_keeps_to_what_the_model_knows(model: Path, here: Here) -> None:
    words = ("run", model, "-p", "w5 w6 w5 w6", "--max-new-tokens", 2, "--dram", 0)
    code, _, err = here(*words, "--lookup", 10, "--context", 256)
    assert code == 0, err
    code, _, err = here(*words, "--lookup", 300)
    assert code == 2 and "a prompt of 6 tokens and --lookup 300, expected fewer in all than the 256 positions" in err

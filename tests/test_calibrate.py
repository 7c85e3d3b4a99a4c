"""The mean squares of what matrices multiply, against hooks on transformers' own model; and packs made with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mhaffn.calibrate import RANDOM_TOKENS, WINDOW, importance_of, mean_squares, random_importance
from mhaffn.cli import main
from mhaffn.config import order
from mhaffn.errors import ConfigError
from mhaffn.formats import Format, Formats
from mhaffn.quantize import quantize
from mhaffn.quantized import dequantize
from mhaffn.store import Store, pack
from mhaffn.store.format import tensor_name
from mhaffn.store.source import open_source
from tests.conftest import Model
from tests.test_evaluate import with_tokenizer, write_text

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def hooked(folder: Path, ids: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """The same from transformers, window by window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(f"{name}.weight", []).append(inputs[0].flatten(0, -2))
            )
    with torch.no_grad():
        for part in ids.split(window):
            if len(part) == window:
                model(part.unsqueeze(0))
    return {name: torch.cat(inputs).double().square().mean(0) for name, inputs in seen.items()}


@pytest.mark.parametrize("options", [{}, {"rope_parameters": LLAMA3}, {"kind": "mistral"}, {"num_key_value_heads": 9}])
@pytest.mark.parametrize("tokens", [40, 3 * WINDOW // 2])
def test_they_are_what_hooks_on_transformers_see(
    tokens: int, options: dict[str, object], tiny_model: Model, device: str
) -> None:
    folder = tiny_model(**options | {"max_position_embeddings": 1024})
    ids = torch.randint(3, 211, (tokens,), generator=torch.Generator().manual_seed(1))
    calls: list[tuple[int, int]] = []
    got = mean_squares(
        open_source(folder), AutoConfig.from_pretrained(folder), ids, torch.device(device),
        lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    expected = hooked(folder, ids, min(tokens, WINDOW))
    store = Store.open(folder)
    matrices = {
        tensor_name(s, weight)
        for s in order(store.config.num_layers)
        for weight, shape in store.config.sublayer_shapes(s.kind).items()
        if len(shape) == 2
    }
    assert got.keys() == expected.keys() == matrices
    for name, squares in got.items():
        assert squares.dtype == torch.float32
        if device == "cpu":
            torch.testing.assert_close(squares.double(), expected[name], rtol=1e-3, atol=1e-7)
        else:  # in bfloat16
            assert (squares - expected[name]).norm() < 5e-2 * expected[name].norm()
    assert calls == [(n, store.config.num_layers) for n in range(store.config.num_layers + 1)]


def test_the_outputs_of_a_calibrated_matrix_are_nearer(tiny_model: Model) -> None:
    folder = tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    source, config = open_source(folder), AutoConfig.from_pretrained(folder)
    read, others = (torch.randint(3, 211, (WINDOW,), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    told, truth = (mean_squares(source, config, ids, torch.device("cpu")) for ids in (read, others))
    better = 0
    for name, importance in told.items():
        matrix, format = source.tensor(name), Format.parse("int4:64")
        errors = [
            ((dequantize(quantize(matrix, format, importance=h)) - matrix).square() * truth[name]).sum()
            for h in (importance, None)
        ]
        better += bool(errors[0] < errors[1])
    assert better >= 0.8 * len(told), "on a text that it was not told of"


def test_pack_takes_a_text(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = with_tokenizer(tiny_model(**options), tmp_path / "source")
    write_text(tmp_path / "text", 200)

    def run(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["mhaffn", "pack", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    formats = ("--ffn", "int4:64", "--mha", "int8")
    assert run(source, tmp_path / "plain", "--calibrate", tmp_path / "text") == 2  # nothing to quantise
    assert run(source, tmp_path / "plain", *formats) == 0
    monkeypatch.setattr("mhaffn.calibrate.mean_squares", lambda *_: pytest.fail("read a model that has no place"))
    assert run(source, tmp_path / "plain", *formats, "--calibrate", tmp_path / "text") == 2
    monkeypatch.undo()
    assert run(source, tmp_path / "told", *formats, "--calibrate", tmp_path / "text") == 0
    name = "layer-001-ffn.safetensors"
    assert (tmp_path / "told" / name).read_bytes() != (tmp_path / "plain" / name).read_bytes()
    inlet, outlet = os.pipe()  # as of <(head -c 100000 text)
    os.write(outlet, (tmp_path / "text").read_bytes())
    os.close(outlet)
    assert run(source, tmp_path / "piped", *formats, "--calibrate", f"/dev/fd/{inlet}") == 0
    os.close(inlet)
    assert (tmp_path / "piped" / name).read_bytes() == (tmp_path / "told" / name).read_bytes()
    store = Store.open(tmp_path / "told")
    assert {str(r.format) for s in store.sublayers.values() for r in s.records} == {"plain", "int4:64", "int8"}
    again = [importance_of(open_source(source), tmp_path / "text") for _ in range(2)]
    assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])


def test_tokens_at_random_need_no_tokenizer(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads the same tokens every time; what they tell is what a pack from the command line is told."""
    source = open_source(
        tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    )
    ids = torch.randint(source.config.vocab_size, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0))
    told = random_importance(source, device="cpu")
    expected = mean_squares(source, AutoConfig.from_pretrained(source.path), ids, torch.device("cpu"))
    assert told.keys() == expected.keys()
    assert all(torch.equal(told[name], expected[name]) for name in told)
    options = ("--ffn", "int4:64", "--calibrate", "random")
    monkeypatch.setattr("mhaffn.calibrate.choose_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr("sys.argv", ["mhaffn", "pack", str(source.path), str(tmp_path / "store"), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    given = pack(source.path, tmp_path / "given", formats=Formats.parse(ffn="int4:64"), importance=lambda _: told)
    plain = pack(source.path, tmp_path / "plain", formats=Formats.parse(ffn="int4:64"))
    for name in ("layer-000-ffn.safetensors", "layer-002-ffn.safetensors"):
        assert (tmp_path / "store" / name).read_bytes() == (given.path / name).read_bytes()
        assert (tmp_path / "store" / name).read_bytes() != (plain.path / name).read_bytes()


def test_texts_that_tell_nothing(tiny_model: Model, tmp_path: Path) -> None:
    source = open_source(with_tokenizer(tiny_model(), tmp_path / "source"))
    write_text(tmp_path / "short", 20)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="got 20 tokens, expected at least 64"):
        importance_of(source, tmp_path / "short")
    for path in (tmp_path / "bytes", tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="text file"):
            importance_of(source, path)
    with pytest.raises(ConfigError, match="transformers finds no tokenizer"):
        importance_of(open_source(tiny_model()), tmp_path / "short")


def test_a_config_that_transformers_cannot_read(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise KeyError("rope")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(ConfigError, match=r"transformers cannot read its config.json .*'rope'"):
        random_importance(open_source(tiny_model()), device="cpu")

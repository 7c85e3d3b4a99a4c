"""Packed stores with weights in few bits: what is written, read again, kept, resumed, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhaffn
from mhaffn.config import Sublayer, order
from mhaffn.errors import ConfigError, CorruptFileError, MhaffnError, StoreError, TruncatedFileError
from mhaffn.formats import ALL_PLAIN, PLAIN, Format, Formats
from mhaffn.quantize import quantize
from mhaffn.quantized import Quantized, dequantize
from mhaffn.store import PackProgress, Store, pack
from mhaffn.store.format import FEW_BITS_INDEX_NAME, tensor_name
from mhaffn.verify import verify

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXED = Formats.parse(mha="int8:32", ffn="int4:64:zeros", layers=["0:ffn=int4:32", "2=plain", "2:mha=fp8"])
W1 = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import _save

    return _save(tmp_path_factory.mktemp("source"), "bfloat16", 1, 0, "llama", WIDTHS)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(source, tmp_path_factory.mktemp("packed") / "store", formats=MIXED, device="cpu").path


def weights_of(store: Store) -> dict[str, torch.Tensor | Quantized]:
    """Every weight of a store's sublayers, by its checkpoint's name."""
    found: dict[str, torch.Tensor | Quantized] = {}
    for sublayer, records in store.sublayers.items():
        for record in records.records:
            parts = {part: load_file(info.path)[info.name] for part, info in record.parts.items()}
            name = tensor_name(sublayer, record.name)
            if record.format == PLAIN:
                found[name] = parts["values"]
            else:
                group = record.format.group or store.config.sublayer_shapes(sublayer.kind)[record.name][1]
                found[name] = Quantized(
                    record.format.name, parts["values"], parts["scales"], parts.get("zeros"), group
                )  # fmt: skip
    return found


def test_each_weight_is_the_source_s_in_the_format_asked_for(source: Path, packed: Path) -> None:
    store, original = Store.open(packed), load_file(source / "model.safetensors")
    assert store.packed and store.dtype == "bfloat16"
    found = weights_of(store)
    for sublayer in order(3):
        for weight, shape in store.config.sublayer_shapes(sublayer.kind).items():
            name, format = tensor_name(sublayer, weight), MIXED.of(sublayer)
            got = found[name]
            if len(shape) == 1 or format == PLAIN:
                assert isinstance(got, torch.Tensor)
                assert torch.equal(got, original[name])
                continue
            assert isinstance(got, Quantized) and format is not None
            expected = quantize(original[name], format)
            assert torch.equal(dequantize(got), dequantize(expected))
            assert (got.format, got.group) == (expected.format, expected.group)
    assert sum(r.nbytes for r in store.sublayers.values()) == sum(map(sum, store.stored().values()))
    for records in store.sublayers.values():
        places = [(tensor.path, tensor.offset) for tensor in records.tensors]
        assert places == sorted(places)


def test_it_is_valid_safetensors_with_an_index_and_its_checksums_hold(packed: Path) -> None:
    index = json.loads((packed / FEW_BITS_INDEX_NAME).read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(packed / file)
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in set(index["weight_map"].values()) for tensor in load_file(packed / file).values()
    )
    assert verify(packed).ok


def test_it_runs_as_the_dequantised_model_does(source: Path, packed: Path, tmp_path: Path) -> None:
    """The same weights dequantised into a plain float32 folder give the same logits."""
    tensors = load_file(source / "model.safetensors") | {
        name: dequantize(w) if isinstance(w, Quantized) else w for name, w in weights_of(Store.open(packed)).items()
    }
    shutil.copytree(source, tmp_path / "plain")
    save_file({name: t.float() for name, t in tensors.items()}, tmp_path / "plain" / "model.safetensors")
    wide = pack(source, tmp_path / "wide", dtype="float32", formats=MIXED).path
    ids = torch.arange(3, 40).unsqueeze(0)
    with mhaffn.load(tmp_path / "plain", device="cpu") as model:
        expected = model(ids).logits
    with mhaffn.load(wide, device="cpu") as model:
        assert (model(ids).logits - expected).abs().max() < 1e-4


def test_every_device_finds_the_same_scales(source: Path, packed: Path, tmp_path: Path, device: str) -> None:
    """But for near ties, which the order of a sum decides."""
    there = weights_of(pack(source, tmp_path / "store", formats=MIXED, device=device))
    for name, here in weights_of(Store.open(packed)).items():
        other = there[name]
        if isinstance(here, Quantized):
            assert isinstance(other, Quantized)
            differ = (dequantize(here) != dequantize(other)).float().mean()
            assert differ < 0.02, name
        else:
            assert torch.equal(here, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("tiers", ["ssd", "dram", "a third each"])
def test_streamed_is_resident_on_every_device(tiers: Any, packed: Path, device: str) -> None:
    ids = torch.arange(3, 40, device=device).unsqueeze(0)

    def run(where: dict[Sublayer, Any]) -> torch.Tensor:
        with mhaffn.load(packed, device=device, tiers=where) as model:
            return model.generate(  # type: ignore[no-any-return]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            ).logits  # fmt: skip

    thirds = dict(zip(order(3), ["gpu", "ssd", "dram", "gpu", "ssd", "dram"], strict=True))
    streamed = run(thirds if tiers == "a third each" else dict.fromkeys(order(3), tiers))
    resident = run(dict.fromkeys(order(3), "gpu"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(streamed, resident, strict=True))


def test_a_killed_pack_goes_on_to_the_same_bytes(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def stop(progress: Any) -> None:
        if progress.file == "layer-001-ffn.safetensors":
            raise Killed

    target = tmp_path / "store"
    with pytest.raises(Killed):
        pack(source, target, formats=MIXED, device="cpu", progress=stop)
    command = "--mha int8:32 --ffn int4:64:zeros --layers 0:ffn=int4:32 --layers 2=plain --layers 2:mha=fp8"
    with pytest.raises(StoreError, match=command):
        Store.open(target)
    for other in (Formats(), Formats.parse(ffn="int4:64:zeros")):
        with pytest.raises(StoreError, match="other formats"):
            pack(source, target, formats=other, device="cpu")
    with pytest.raises(StoreError, match="searched on 'cpu', and would go on on 'cuda'"):
        pack(source, target, formats=MIXED, device="cuda")
    with pytest.raises(StoreError, match="chosen by weights alone, and would go on by which columns matter"):
        pack(source, target, formats=MIXED, device="cpu", importance=lambda _: {W1: torch.ones(64)})
    pack(source, target, formats=MIXED, device="cpu")
    names = sorted(path.name for path in packed.iterdir())
    assert names == sorted(path.name for path in target.iterdir())
    assert all((packed / name).read_bytes() == (target / name).read_bytes() for name in names)


def stop_at(file: str) -> Callable[[PackProgress], None]:
    def stop(progress: PackProgress) -> None:
        if progress.file == file:
            raise KeyboardInterrupt

    return stop


def test_another_search_does_not_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this package or of another torch: its scales beside the earlier ones would be no pack's."""
    target, other = tmp_path / "store", tmp_path / "other"

    def go_on(progress: Callable[[PackProgress], None] = lambda _: None) -> Store:
        return pack(source, target, formats=MIXED, device="cpu", ffn_dir=other, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        go_on(stop_at("layer-001-ffn.safetensors"))
    begun = {path: path.read_bytes() for path in [*target.iterdir(), *other.iterdir()]}
    for changed in ("mhaffn.quantize.SEARCH", "torch.__version__"):
        with monkeypatch.context() as patched:
            patched.setattr(changed, "999")
            with pytest.raises(
                StoreError, match=r"found by search .*, and would go on by .*999.*Go on with the version"
            ):
                go_on()
    assert begun == {path: path.read_bytes() for path in [*target.iterdir(), *other.iterdir()]}
    assert go_on().packed


def test_a_pack_begun_before_searches_had_a_number_does_not_go_on(source: Path, tmp_path: Path) -> None:
    formats, target = Formats.parse(ffn="int4:64"), tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        pack(source, target, formats=formats, progress=stop_at("layer-001-mha.safetensors"))
    state = target / "mhaffn-pack.json"
    values = json.loads(state.read_text())
    del values["search"]
    state.write_text(json.dumps(values, indent=1))
    with pytest.raises(StoreError, match="found by search an earlier one, and would go on by"):
        pack(source, target, formats=formats)


def test_a_plain_pack_goes_on_whatever_the_search(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "store", progress=stop_at("layer-001-mha.safetensors"))
    monkeypatch.setattr("mhaffn.quantize.SEARCH", "999")
    assert pack(source, tmp_path / "store").packed


def test_the_importance_of_columns_changes_what_is_written(source: Path, tmp_path: Path) -> None:
    importance = {W1: torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 8}
    store = pack(source, tmp_path / "store", formats=Formats.parse(ffn="int4:64"), importance=lambda _: importance)
    original = load_file(source / "model.safetensors")[W1]
    got = weights_of(store)[W1]
    assert isinstance(got, Quantized)
    assert torch.equal(
        dequantize(got), dequantize(quantize(original, Format.parse("int4:64"), importance=importance[W1]))
    )
    assert not torch.equal(dequantize(got), dequantize(quantize(original, Format.parse("int4:64"))))


def test_what_a_calibrated_pack_is_told_to_go_on(source: Path, tmp_path: Path) -> None:
    """The command cannot name the text, so it names none; another text does not go on."""
    formats, importance = Formats.parse(ffn="int4:64"), lambda _: {W1: torch.ones(64)}
    with pytest.raises(KeyboardInterrupt):
        pack(
            source,
            tmp_path / "store",
            formats=formats,
            importance=importance,
            progress=stop_at("layer-001-mha.safetensors"),
        )
    with pytest.raises(StoreError, match="Run the same `mhaffn pack` again"):
        Store.open(tmp_path / "store")
    for other in ({W1: torch.ones(64).index_fill(0, torch.tensor(3), 2)}, {W1.replace("gate", "up"): torch.ones(64)}):
        with pytest.raises(StoreError, match=r"which columns matter .* Go on with the same --calibrate"):
            pack(source, tmp_path / "store", formats=formats, importance=lambda _, other=other: other)  # type: ignore[misc]
    pack(source, tmp_path / "store", formats=formats, importance=importance)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device": "cuda", "importance": "0"}, "searched on 'cuda', and would go on on 'cpu'"),
        ({"search": "0", "importance": "0"}, "found by search '0', and would go on by"),
        ({"search": "0", "device": "cuda"}, "found by search '0', and would go on by"),
        ({"importance": [None]}, r"chosen by which columns matter \(\[None\]\), and would go on by weights alone"),
        ({"search": ["x" * 9999], "device": 7}, r"found by search \['xx"),
        ({"formats": [], "device": "cuda"}, "another dtype or other formats"),
    ],
)
def test_a_pack_that_several_things_keep_from_going_on(
    other: dict[str, object], words: str, source: Path, tmp_path: Path
) -> None:
    """Another torch, or a GPU gone, also makes other numbers of the same text: it is named, not the text."""
    formats, target = Formats.parse(ffn="int4:64"), tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        pack(source, target, formats=formats, device="cpu", progress=stop_at("layer-001-mha.safetensors"))
    state = target / "mhaffn-pack.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | other, indent=1))
    with pytest.raises(StoreError, match=words) as caught:
        pack(source, target, formats=formats, device="cpu")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["device", "search", "importance"])
def test_a_plain_pack_with_the_state_of_another(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "store", progress=stop_at("layer-001-mha.safetensors"))
    state = tmp_path / "store" / "mhaffn-pack.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {name: "cpu"}, indent=1))
    with pytest.raises(StoreError, match="another dtype or other formats"):
        pack(source, tmp_path / "store")


def test_importance_of_what_is_not_there_or_not_quantised(source: Path, tmp_path: Path) -> None:
    formats = Formats.parse(ffn="int4:64")
    with pytest.raises(ConfigError, match="'other'"):
        pack(source, tmp_path / "store", formats=formats, importance=lambda _: {"other": torch.ones(64)})
    for formats in (Formats(), Formats.parse(ffn="plain")):
        with pytest.raises(ConfigError, match="no format to quantise to"):
            pack(source, tmp_path / "store", formats=formats, importance=lambda _: pytest.fail("too early"))
    assert not (tmp_path / "store").exists()


def test_what_columns_matter_is_found_out_once_the_folders_are_held_and_have_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats, target = Formats.parse(ffn="int4:64"), tmp_path / "store"

    def meanwhile(_: object) -> dict[str, torch.Tensor]:
        with pytest.raises(StoreError, match="being written by another pack"):
            pack(source, target, formats=formats, importance=lambda _: pytest.fail("too early"))
        return {}

    store = pack(source, target, formats=formats, importance=meanwhile)
    assert not (target / "mhaffn-pack.json").exists() and store.sublayers
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(StoreError, match="free"):
        pack(source, tmp_path / "other", formats=formats, importance=lambda _: pytest.fail("too early"))


def test_formats_that_do_not_fit_and_values_that_cannot_be_kept(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divides its 64 columns"):
        pack(source, tmp_path / "a", formats=Formats.parse(ffn="int4:128"))
    with pytest.raises(ConfigError, match="layers from 0 to 2"):
        pack(source, tmp_path / "a", formats=Formats.parse(layers=["3=plain"]))
    assert not (tmp_path / "a").exists()
    shutil.copytree(source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[W1][3, 5] = float("inf")
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(StoreError, match=f"tensor {W1}: got a matrix with values that are not finite"):
        pack(tmp_path / "source", tmp_path / "b", formats=Formats.parse(ffn="int4:64"))


def damaged(packed: Path, folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """The store with tensors of layer 1's FFN changed or left out, and checksums that fit."""
    import xxhash

    from mhaffn.store.safetensors import read_header

    shutil.copytree(packed, folder)
    file = folder / "layer-001-ffn.safetensors"
    tensors = {name: t for name, t in (load_file(file) | changes).items() if t is not None}
    save_file(tensors, file, {"format": "pt"})
    index = json.loads((folder / FEW_BITS_INDEX_NAME).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file.name} | dict.fromkeys(
        tensors, file.name
    )
    (folder / FEW_BITS_INDEX_NAME).write_text(json.dumps(index))
    digest = xxhash.xxh3_64()
    for info in read_header(file).tensors:
        digest.update(file.read_bytes()[info.offset : info.offset + info.nbytes])
    manifest = json.loads((folder / "mhaffn.json").read_text())
    manifest["checksums"]["1.ffn"] = digest.hexdigest()
    (folder / "mhaffn.json").write_text(json.dumps(manifest))
    return folder


SCALES, ZEROS = f"{W1}.scales", f"{W1}.zeros"
HOSTILE: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no scales": ({SCALES: None}, "got no tensor model.layers.1.mlp.gate_proj.weight.scales"),
    "a scale too many": ({SCALES: torch.ones(129, 1).half()}, r"expected \[128, 1\]"),
    "groups that do not divide": ({SCALES: torch.ones(128, 3).half()}, "expected groups of 32, 64, 128, 256"),
    "no groups": ({SCALES: torch.ones(128, 0).half()}, "expected groups of"),
    "groups of 16": ({SCALES: torch.ones(128, 4).half()}, "expected groups of"),
    "scales of one dimension": ({SCALES: torch.ones(128).half()}, "expected groups of"),
    "whole numbers as scales": ({SCALES: torch.ones(128, 1).int()}, "got scales .* in I32"),
    "half the values": ({W1: torch.zeros(128, 16, dtype=torch.uint8)}, r"expected \[128, 32\]"),
    "values of no format": ({W1: torch.zeros(128, 32, dtype=torch.int16)}, "got tensor"),
    "zero points of another dtype": ({ZEROS: torch.zeros(128, 1)}, "expected float16"),
    "zero points of another shape": ({ZEROS: torch.zeros(128, 2).half()}, r"expected \[128, 1\]"),
    "zero points of int8": ({W1: torch.zeros(128, 64, dtype=torch.int8)}, "got zero points"),
    "fp8 in groups": (
        {W1: torch.zeros(128, 64).to(torch.float8_e4m3fn), ZEROS: None, SCALES: torch.ones(128, 2).half()},
        "the whole row as a group",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_parts_are_refused(what: str, packed: Path, tmp_path: Path) -> None:
    changes, message = HOSTILE[what]
    folder = damaged(packed, tmp_path / "store", changes)
    with pytest.raises(CorruptFileError, match=message):
        Store.open(folder)
    found = verify(folder)
    assert [damage.part for damage in found.damages] == [str(Sublayer(1, "ffn"))]


@pytest.mark.parametrize("tiers", ["ssd", "dram"])
@pytest.mark.parametrize("part", [SCALES, ZEROS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float, part: str, tiers: Any, packed: Path, tmp_path: Path) -> None:
    scales = load_file(packed / "layer-001-ffn.safetensors")[part]
    scales[5, 0] = value
    folder = damaged(packed, tmp_path / "store", {part: scales})

    def run() -> None:
        with mhaffn.load(folder, device="cpu", tiers=dict.fromkeys(order(3), tiers)) as model:
            model(torch.arange(3, 9).unsqueeze(0))

    with pytest.raises(CorruptFileError, match=rf"{part.rpartition('.')[2]} of layer 1 ffn, w1, that are not finite"):
        run()


def test_a_file_cut_short(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "store")
    file = tmp_path / "store" / "layer-001-ffn.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(TruncatedFileError):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("seed", range(40))
def test_parts_at_random_are_read_or_refused(seed: int, packed: Path, tmp_path: Path) -> None:
    """Any dtype and shape for any part: a typed error, or a store whose parts agree."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: list[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    dtypes = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.int64]
    name = pick([W1, SCALES, ZEROS])
    shape = (pick([0, 1, 64, 128, 256]), pick([0, 1, 2, 4, 32, 64, 128]))
    folder = damaged(packed, tmp_path / "store", {name: pick([None, torch.zeros(shape).to(pick(dtypes))])})
    try:
        store = Store.open(folder)
    except MhaffnError:
        return
    records = {record.name: record for record in store.sublayers[Sublayer(1, "ffn")].records}["w1"]
    expected = records.format.parts((128, 64), "bfloat16")
    assert {p: info.shape for p, info in records.parts.items()} == {p: part.shape for p, part in expected.items()}
    with mhaffn.load(folder, device="cpu") as model:
        model(torch.arange(3, 9).unsqueeze(0))


def test_a_packed_store_is_a_source_too(packed: Path, tmp_path: Path) -> None:
    same = pack(packed, tmp_path / "same")
    files = sorted(path.name for path in packed.glob("layer-*"))
    assert all((packed / name).read_bytes() == (tmp_path / "same" / name).read_bytes() for name in files)
    plain = pack(packed, tmp_path / "plain", dtype="float32", formats=ALL_PLAIN)
    values, wide = weights_of(same), weights_of(plain)
    for name, weight in values.items():
        expected = dequantize(weight) if isinstance(weight, Quantized) else weight.float()
        assert torch.equal(wide[name], expected)  # type: ignore[arg-type]


def test_transformers_refuses_what_it_would_misread(source: Path, tmp_path: Path) -> None:
    """int8 values have the very shape of the weights: without a word it would take them for weights."""
    from transformers import AutoModelForCausalLM

    pack(source, tmp_path / "int8", formats=Formats.parse("int8", "int8"))
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    with mhaffn.load(tmp_path / "int8", device="cpu") as model:
        ids = torch.arange(3, 9).unsqueeze(0)
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape[1] == 9
    plain = pack(tmp_path / "int8", tmp_path / "plain", formats=ALL_PLAIN)
    assert "quantization_config" not in json.loads((plain.path / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(plain.path)

"""Names of formats, what they are made of, and which sublayer has which."""

from __future__ import annotations

import re

import pytest
import torch

from mhaffn.config import Sublayer, order
from mhaffn.errors import ConfigError
from mhaffn.formats import GROUPS, PLAIN, Format, Formats, Part
from mhaffn.shapes import SHAPES

LLAMA_70B = SHAPES["llama3-70b"]
NAMES = {
    "plain": PLAIN,
    "int8": Format("int8"),
    "int8:64": Format("int8", 64),
    "fp8": Format("fp8"),
    "int4": Format("int4", 128),
    "int4:64": Format("int4", 64),
    "int4:32:zeros": Format("int4", 32, True),
    "int4:zeros": Format("int4", 128, True),
}


@pytest.mark.parametrize("text", NAMES)
def test_a_name_and_its_format(text: str) -> None:
    format = Format.parse(text)
    assert format == NAMES[text]
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize(
    "text", ["", "int3", "INT4", "int4:", "int4:48", "int4:-64", "int4:64:64", "int4:zeros:64", "int8:zeros", "fp8:128",
             "plain:64", "int4:٦٤", "int4 "]
)  # fmt: skip
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected plain, int8, int4, fp8"):
        Format.parse(text)


@pytest.mark.parametrize("text", NAMES)
@pytest.mark.parametrize("shape", [(6, 256), (1, 512), (5, 768)])
def test_parts_are_those_of_a_quantised_matrix(text: str, shape: tuple[int, int]) -> None:
    from mhaffn.quantize import quantize

    format, matrix = Format.parse(text), torch.randn(shape)
    parts = format.parts(shape, "bfloat16")
    assert format.parts((7,), "bfloat16") == {"values": Part("bfloat16", (7,))}, "norms are plain"
    if format == PLAIN:
        assert parts == {"values": Part("bfloat16", shape)}
        return
    made = quantize(matrix, format, nearest=True)
    found = {"values": made.values, "scales": made.scales} | ({} if made.zeros is None else {"zeros": made.zeros})
    assert parts == {
        name: Part(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in found.items()
    }  # fmt: skip
    assert sum(part.nbytes for part in parts.values()) == made.nbytes


def test_the_last_that_is_given_counts() -> None:
    formats = Formats.parse(mha="int8", ffn="int4", layers=["0-1,78-79=plain", "78:ffn=fp8", "3:mha=int4:64"])
    formats.check(LLAMA_70B)
    of = {s: formats.of(s) for s in order(80)}
    assert {of[Sublayer(layer, kind)] for layer in (0, 1, 79) for kind in ("mha", "ffn")} == {PLAIN}
    assert (of[Sublayer(78, "mha")], of[Sublayer(78, "ffn")]) == (PLAIN, Format("fp8"))
    assert (of[Sublayer(3, "mha")], of[Sublayer(3, "ffn")]) == (Format("int4", 64), Format("int4", 128))
    assert (of[Sublayer(40, "mha")], of[Sublayer(40, "ffn")]) == (Format("int8"), Format("int4", 128))
    options = formats.options()
    kinds = dict(zip(options[::2], options[1::2], strict=True))
    assert (kinds["--mha"], kinds["--ffn"]) == ("int8", "int4:128")
    layers = [word for name, word in zip(options[::2], options[1::2], strict=True) if name == "--layers"]
    assert Formats.parse(kinds["--mha"], kinds["--ffn"], layers) == formats


def test_without_any_a_sublayer_stays_as_it_is() -> None:
    assert not Formats()
    assert Formats.parse(ffn="int4").of(Sublayer(0, "mha")) is None


@pytest.mark.parametrize(
    "text", ["", "=plain", "0", "0=", "1-0=plain", "0..3=plain", "0,=plain", "0:norm=plain", "a=plain", "0-1=int5",
             "999999=plain"]
)  # fmt: skip
def test_other_layers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Formats.parse(layers=[text])


def test_layers_that_a_model_has_not() -> None:
    with pytest.raises(ConfigError, match=re.escape("got --layers 79-80=plain, expected layers from 0 to 79")):
        Formats.parse(layers=["79-80=plain"]).check(LLAMA_70B)


def test_a_group_that_does_not_divide_the_width(tmp_path: object) -> None:
    from dataclasses import replace

    narrow = replace(LLAMA_70B, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64)
    with pytest.raises(ConfigError, match=re.escape("w1 [1536, 576], expected a group that divides its 576 columns. "
                                                    "Take int4:64.")):  # fmt: skip
        Formats.parse(ffn="int4").check(narrow)
    Formats.parse(mha="int4:64", ffn="int8").check(narrow)
    odd = replace(narrow, hidden_size=9, head_dim=1)
    with pytest.raises(ConfigError, match="Take int8"):
        Formats.parse(mha="int4:32").check(odd)
    assert tuple(sorted(GROUPS)) == GROUPS

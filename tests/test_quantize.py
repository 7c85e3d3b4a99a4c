"""Matrices to few bits and back."""

from __future__ import annotations

import pytest
import torch
import xxhash

from mhaffn.errors import ConfigError
from mhaffn.formats import Format
from mhaffn.quantize import SEARCH, quantize
from mhaffn.quantized import Quantized, dequantize

FORMATS = ["int8", "int8:64", "fp8", "int4", "int4:64", "int4:32", "int4:64:zeros"]


def matrix_of(rows: int, columns: int, seed: int = 0, outliers: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    if outliers:
        matrix[torch.rand(rows, columns, generator=generator) < 0.01] *= 12
    return matrix * 0.02


def error(matrix: torch.Tensor, weight: Quantized, importance: torch.Tensor | None = None) -> float:
    squares = (dequantize(weight) - matrix.float()).square()
    return float((squares if importance is None else squares * importance).sum())


def formula(weight: Quantized, n: int, column: int) -> float:
    """One value, by the table of mhaffn.quantized."""
    group = column // weight.group
    scale = float(weight.scales[n, group])
    if weight.format != "int4":
        return float(weight.values[n, column].float()) * scale
    byte = int(weight.values[n, column // 2])
    q = byte >> 4 if column % 2 else byte & 15
    return (q - (8.0 if weight.zeros is None else float(weight.zeros[n, group]))) * scale


@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("text", FORMATS)
def test_values_are_those_of_the_formula(text: str, nearest: bool) -> None:
    matrix = matrix_of(3, 256)
    weight = quantize(matrix, Format.parse(text), nearest=nearest)
    assert weight.shape == (3, 256)
    got = dequantize(weight)
    for n, column in [(0, 0), (1, 1), (2, 128), (0, 255), (1, 63), (2, 64), (0, 33)]:
        assert float(got[n, column]) == pytest.approx(formula(weight, n, column), rel=1e-6)
    step = weight.scales.float().abs().amax() * (32 if text == "fp8" else 1)
    reach = 4 if not nearest else 0.51  # a search may clip the widest values
    assert (got - matrix).abs().max() <= reach * step


def counts(matrix: torch.Tensor, format: Format, group: int) -> torch.Tensor:
    """How much the square of each error counts where no importance is given, by the docstring of mhaffn.quantize."""
    if format.name != "int4" or format.zeros:
        return torch.ones(matrix.shape)
    squares = matrix.double().square().view(len(matrix), -1, group)
    return (squares + squares.mean(-1, keepdim=True)).sqrt().view(matrix.shape)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("text", FORMATS)
def test_the_search_is_never_worse_than_nearest(text: str, outliers: bool) -> None:
    matrix = matrix_of(64, 512, outliers=outliers)
    format = Format.parse(text)
    made = {nearest: quantize(matrix, format, nearest=nearest) for nearest in (True, False)}
    for counted in (None, counts(matrix, format, made[True].group)):
        nearest, searched = (error(matrix, made[way], counted) for way in (True, False))
        assert searched <= nearest * 1.0001
        if text.startswith("int4"):
            assert searched < 0.92 * nearest


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("text", "low", "high", "signs"),
    [("int4:64", -8, 7, (1, -1)), ("int8:64", -127, 127, (1,)), ("int8:32", -127, 127, (1,))],
)
def test_hardly_a_scale_is_better_than_the_one_found(
    text: str, low: int, high: int, signs: tuple[int, ...], told: bool
) -> None:
    """Against 1200 scales for each group; int8 has many nearly as good as each other, of which it tries a few."""
    matrix, format = matrix_of(16, 256), Format.parse(text)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5 if told else None
    weight = quantize(matrix, format, importance=importance)
    groups = matrix.view(16, -1, weight.group)
    counted = counts(matrix, format, weight.group) if importance is None else importance.expand(matrix.shape)
    counted = counted.view(groups.shape)
    widest = groups.abs().amax(-1, keepdim=True) / high
    least = torch.full(groups.shape[:-1], torch.inf, dtype=counted.dtype)
    for ratio in torch.linspace(0.7, 1.3, 1200):
        for sign in signs:
            scales = (widest * ratio * sign).half().float()
            back = (groups / scales).round().clamp(low, high) * scales
            least = torch.minimum(least, ((back - groups).square() * counted).sum(-1))
    assert error(matrix, weight, counted.view(matrix.shape)) <= (1.005 if high == 7 else 1.06) * float(least.sum())


@pytest.mark.parametrize("text", ["int4:64", "int4:64:zeros", "int8"])
def test_importance_says_where_errors_matter(text: str) -> None:
    matrix, format = matrix_of(64, 256, outliers=True), Format.parse(text)
    importance = torch.rand(256) ** 6 * 100
    told = error(matrix, quantize(matrix, format, importance=importance), importance)
    assert told < error(matrix, quantize(matrix, format), importance)


@pytest.mark.parametrize("text", FORMATS)
def test_the_same_bits_every_time_whatever_the_dtype_and_the_piece(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, format = matrix_of(33, 256).bfloat16(), Format.parse(text)
    first = quantize(matrix, format)
    monkeypatch.setattr("mhaffn.quantize.ROWS_ELEMENTS", {"cpu": 256 * 5})
    for again in (quantize(matrix.float(), format), quantize(matrix.double(), format)):
        for part in ("values", "scales", "zeros"):
            one, other = getattr(first, part), getattr(again, part)
            assert one is other is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("text", FORMATS)
def test_zeros_and_tiny_values_stay(text: str) -> None:
    matrix = torch.zeros(4, 256)
    matrix[1] = 1e-30
    matrix[2, 7] = -3.0
    weight = quantize(matrix, Format.parse(text))
    got = dequantize(weight)
    assert bool(weight.scales.isfinite().all())
    assert not got[0].any()
    assert float(got[2, 7]) == pytest.approx(-3.0, rel=0.08)


@pytest.mark.parametrize("magnitude", [1e-39, 1e-38, 3e-38])
@pytest.mark.parametrize("text", FORMATS)
def test_a_row_below_all_scales_becomes_zeros(text: str, magnitude: float) -> None:
    matrix = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    matrix[1] *= magnitude
    weight = quantize(matrix, Format.parse(text), importance=torch.full((256,), 1e-38))
    assert weight.zeros is None or bool(weight.zeros.isfinite().all())
    assert dequantize(weight)[1].abs().max() <= 1e-4


def test_what_cannot_be_quantised() -> None:
    for text in ("int8", "fp8", "int4:64", "int4:64:zeros"):
        with pytest.raises(ConfigError, match=r"too small for scales in torch\.float16"):
            quantize(torch.full((2, 64), 1e-9), Format.parse(text))
    with pytest.raises(ConfigError, match="not finite"):
        quantize(torch.tensor([[float("nan")] * 64]), Format.parse("int8"))
    with pytest.raises(ConfigError, match=r"beyond torch\.float16"):
        quantize(torch.full((1, 64), 1e9), Format.parse("int8"))
    with pytest.raises(ConfigError, match="divides 96"):
        quantize(torch.zeros(2, 96), Format.parse("int4"))
    for importance in (torch.ones(63), torch.full((64,), -1.0), torch.full((64,), float("inf"))):
        with pytest.raises(ConfigError, match="got importance"):
            quantize(torch.zeros(2, 64), Format.parse("int4:64"), importance=importance)
    unknown = quantize(torch.ones(2, 64), Format.parse("int4:64"), importance=torch.zeros(64))
    assert torch.equal(dequantize(unknown), torch.ones(2, 64)), "inputs that were never seen weigh all the same"


def test_other_bits_have_another_number() -> None:
    """An unfinished pack goes on only by the search it began with: whoever changes what is found raises SEARCH."""
    digest = xxhash.xxh3_64()
    importance = torch.arange(256) % 7 + 1.0
    for text in FORMATS:
        for given in (None, importance):
            weight = quantize(matrix_of(4, 256, outliers=True), Format.parse(text), importance=given)
            for part in (weight.values, weight.scales, weight.zeros):
                if part is not None:
                    digest.update(part.view(torch.uint8).numpy().tobytes())
    assert (SEARCH, digest.hexdigest()) == (1, "7954c887b1234709")

"""Headers of safetensors files: what is right is read as the safetensors library reads it; the rest is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mhaffn.errors import CorruptFileError, MhaffnError, StoreError, TruncatedFileError
from mhaffn.store.safetensors import DTYPE_BITS, HEADER_BYTES_MAX, read_header, write_header
from tests.store.models import raw_safetensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]


def entry(begin: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    metadata=st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_reads_what_the_library_writes(
    shapes: list[list[int]], dtypes: list[torch.dtype], metadata: dict[str, str] | None, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    tensors = {
        f"t{i}": torch.ones(shape).to(dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    save_file(tensors, path, metadata)
    header, content = read_header(path), path.read_bytes()
    assert header.metadata == (metadata or {})
    assert {tensor.name for tensor in header.tensors} == tensors.keys()
    for tensor in header.tensors:
        expected = tensors[tensor.name]
        assert tensor.shape == tuple(expected.shape)
        assert tensor.path == str(path)
        raw = (
            expected.contiguous().view(-1).view(torch.uint8) if expected.numel() else torch.empty(0, dtype=torch.uint8)
        )
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == raw.numpy().tobytes()


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), align=st.sampled_from([1, 8, 64, 4096]))
@settings(max_examples=40, deadline=None)
def test_the_library_reads_what_is_written(sizes: list[int], align: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    header = write_header({f"t{i}": ("U8", (n,), n) for i, n in enumerate(sizes)}, {"a": "b"}, align)
    data = os.urandom(sum(sizes))
    path.write_bytes(header + data)
    assert len(header) % align == 0
    with safe_open(path, framework="pt") as file:
        read = b"".join(file.get_tensor(f"t{i}").numpy().tobytes() for i in range(len(sizes)))
    assert read == data
    assert [tensor.nbytes for tensor in sorted(read_header(path).tensors, key=lambda t: t.name)] == sizes


CORRUPT: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "no header": struct.pack("<Q", 0),
    "header longer than the file": raw_safetensors({}, length=100),
    "header as long as the file": raw_safetensors({}, length=10),
    "header of 2**64 - 1 bytes": raw_safetensors({}, length=2**64 - 1),
    "header cut short": raw_safetensors({"a": entry(0, 4)}, bytes(4), length=12),
    "not UTF-8": raw_safetensors(b'{"\xff": 1}'),
    "byte order mark": raw_safetensors(b"\xef\xbb\xbf{}"),
    "not JSON": raw_safetensors(b"{nonsense}"),
    "pickle": b"\x80\x04\x95" + bytes(60),
    "two JSON values": raw_safetensors(b"{}{}"),
    "nested deeply": raw_safetensors(b"[" * 100_000),
    "nested deeply in metadata": raw_safetensors(b'{"__metadata__":' + b'{"a":' * 50_000),
    "a list": raw_safetensors([]),
    "null": raw_safetensors(None),
    "a huge number": raw_safetensors(b'{"a": ' + b"9" * 5000 + b"}"),
    "duplicate names": raw_safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"1"),
    "duplicate field": raw_safetensors(b'{"a": {"dtype": "U8", "shape": [0], "shape": [0], "data_offsets": [0, 0]}}'),
    "metadata list": raw_safetensors({"__metadata__": [1]}),
    "metadata number": raw_safetensors({"__metadata__": {"a": 1}}),
    "metadata as tensor": raw_safetensors({"__metadata__": entry(0, 0)}),
    "entry null": raw_safetensors({"a": None}),
    "entry list": raw_safetensors({"a": [0, 1]}),
    "entry empty": raw_safetensors({"a": {}}),
    "dtype unknown": raw_safetensors({"a": entry(0, 1, "Q4_K")}, b"1"),
    "dtype list": raw_safetensors({"a": entry(0, 1, ["U8"])}, b"1"),
    "dtype object": raw_safetensors({"a": entry(0, 1, {"U8": 1})}, b"1"),
    "shape null": raw_safetensors({"a": entry(0, 1) | {"shape": None}}, b"1"),
    "shape negative": raw_safetensors({"a": entry(0, 1, shape=[-1])}, b"1"),
    "shape float": raw_safetensors({"a": entry(0, 1, shape=[1.0])}, b"1"),
    "shape bool": raw_safetensors({"a": entry(0, 1, shape=[True])}, b"1"),
    "shape NaN": raw_safetensors(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 1]}}', b"1"),
    "shape overflows 64 bits": raw_safetensors({"a": entry(0, 0, shape=[2**32, 2**32])}),
    "shape overflows a float": raw_safetensors({"a": entry(0, 1, shape=[2**62] * 60)}, b"1"),
    "shape of a million dimensions": raw_safetensors({"a": entry(0, 1, shape=[2**62] * 1_000_000)}, b"1"),
    "shape too large": raw_safetensors({"a": entry(0, 1, shape=[2])}, b"1"),
    "shape too small": raw_safetensors({"a": entry(0, 8, "F32", shape=[1])}, bytes(8)),
    "offsets missing": raw_safetensors({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "offsets swapped": raw_safetensors({"a": entry(0, 1) | {"data_offsets": [1, 0]}}, b"1"),
    "offsets negative": raw_safetensors({"a": entry(0, 1) | {"data_offsets": [-1, 0]}}, b"1"),
    "offsets floats": raw_safetensors({"a": entry(0, 1) | {"data_offsets": [0.0, 1.0]}}, b"1"),
    "offsets bools": raw_safetensors({"a": entry(0, 1) | {"data_offsets": [False, True]}}, b"1"),
    "offsets three": raw_safetensors({"a": entry(0, 1) | {"data_offsets": [0, 1, 1]}}, b"1"),
    "offsets past 64 bits": raw_safetensors({"a": entry(0, 1) | {"data_offsets": [2**64, 2**64 + 1]}}, b"1"),
    "overlap": raw_safetensors({"a": entry(0, 4), "b": entry(3, 7)}, bytes(7)),
    "overlap, nested": raw_safetensors({"a": entry(0, 8), "b": entry(2, 4)}, bytes(8)),
    "overlap, the same bytes": raw_safetensors({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "overlap, an empty tensor": raw_safetensors({"a": entry(0, 8), "b": entry(4, 4)}, bytes(8)),
    "hole": raw_safetensors({"a": entry(0, 4), "b": entry(5, 7)}, bytes(7)),
    "hole at the start": raw_safetensors({"a": entry(1, 4)}, bytes(4)),
    "bytes after the end": raw_safetensors({"a": entry(0, 4)}, bytes(5)),
    "half a byte": raw_safetensors({"a": entry(0, 1, "F4", shape=[1])}, b"1"),
    "six bits": raw_safetensors({"a": entry(0, 1, "F6_E2M3", shape=[1])}, b"1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.timeout(20)
def test_corrupt_headers_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CORRUPT[name])
    with pytest.raises(CorruptFileError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert "fetch it again" in message
    assert len(message) < 1500, "a hostile header must not flood the terminal"
    assert message.isprintable()


def test_the_cap_on_headers_holds_for_a_sparse_file_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES_MAX + 1))
        file.truncate(2 * HEADER_BYTES_MAX)
    with pytest.raises(CorruptFileError, match=f"{HEADER_BYTES_MAX + 1} bytes, expected at most {HEADER_BYTES_MAX}"):
        read_header(path)


def test_truncated_data(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = raw_safetensors({"a": entry(0, 4), "b": entry(4, 12)}, bytes(12))
    for cut in (1, 8, 12):
        path.write_bytes(content[:-cut])
        with pytest.raises(
            TruncatedFileError, match=f"got {len(content) - cut} bytes, expected {len(content)}"
        ) as caught:
            read_header(path)
        assert (caught.value.path, caught.value.offset, caught.value.length) == (str(path), len(content) - cut, cut)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": None},
        {"a": entry(0, 0, "F32", [0, 7]), "b": entry(0, 4), "c": entry(4, 4, "I64", [0])},
        {"a": entry(0, 2, "F4", [2, 2])},
        {"a": entry(0, 3, "F6_E3M2", [4])},
        {"a": entry(0, 4, "F32", [])},
        {"b": entry(2, 4), "a": entry(0, 2)},
        {"a": entry(0, 1) | {"later": "field"}},
    ],
)
def test_odd_but_right_headers(header: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    end = max((value["data_offsets"][1] for value in header.values() if value), default=0)
    path.write_bytes(raw_safetensors(header, bytes(end)))
    tensors = read_header(path).tensors
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(tensor.name for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == end
    assert [tensor.offset for tensor in tensors] == sorted(tensor.offset for tensor in tensors)


def test_every_dtype_of_the_format_is_known(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for dtype, bits in DTYPE_BITS.items():
        path.write_bytes(raw_safetensors({"a": entry(0, bits, dtype, [8])}, bytes(bits)))
        assert read_header(path).tensors[0].nbytes == bits
        with safe_open(path, framework="np") as file:
            assert list(file.keys()) == ["a"]


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "kind", ["missing", "folder", "pipe", "device", "dangling link", "link to itself", "zero byte", "long"]
)
def test_anything_but_a_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "zero byte":
        path = tmp_path / "a\0b"
    elif kind == "long":
        path = tmp_path / ("a" * 300)
    with pytest.raises(StoreError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "etch the" in str(caught.value)


numbers = st.integers(-(2**70), 2**70) | st.integers(0, 9) | st.floats() | st.booleans() | st.none() | st.just("U8")
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "", None, 1]),
        "shape": st.lists(numbers, max_size=3) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | numbers,
    },
)


@given(header=st.dictionaries(st.text(max_size=3), entries | numbers, max_size=3), data=st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_refused_here_or_readable_by_the_library(header: dict[str, Any], data: bytes, tmp_path_factory: Any) -> None:
    check_against_library(raw_safetensors(header, data), tmp_path_factory)


@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 20),
)
@settings(max_examples=300, deadline=None)
def test_damaged_files(flips: list[tuple[int, int]], cut: int, tmp_path_factory: Any) -> None:
    content = bytearray(
        raw_safetensors({"a": entry(0, 8, "F32", [2]), "b": entry(8, 12), "__metadata__": {"k": "v"}}, bytes(12))
    )
    for position, value in flips:
        content[position % len(content)] = value
    check_against_library(bytes(content[: len(content) - cut]), tmp_path_factory)


def check_against_library(content: bytes, tmp_path_factory: Any) -> None:
    """What is accepted here, the library accepts too, and both see the same tensors."""
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path).tensors
    except MhaffnError as error:
        assert str(path) in str(error)
        return
    try:
        with safe_open(path, framework="np") as file:
            assert sorted(file.keys()) == sorted(tensor.name for tensor in tensors)
            assert all(tuple(file.get_slice(t.name).get_shape()) == t.shape for t in tensors)
    except SafetensorError as error:  # the library refuses lone surrogates, which JSON in Python lets pass
        assert "hex escape" in str(error) or "surrogate" in str(error)

"""Opening files that may be anything."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhaffn.errors import ConfigError
from mhaffn.files import (
    JSON_BYTES_MAX,
    open_regular,
    parse_json,
    read_json_object,
    shown,
    stoppable,
    trial_file,
    undisturbed,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(value=json_values)
@settings(max_examples=100, deadline=None)
def test_json_is_read_as_it_was_written(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@given(content=st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_parse_or_raise_value_error(content: bytes) -> None:
    with suppress(ValueError):
        parse_json(content)


@pytest.mark.parametrize(
    "content", [b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "a": 2}}]', b"[" * 10**5, b"9" * 10**4, b"\xff", b""]
)
def test_what_readers_could_differ_on_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(content)


def test_json_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError):
        read_json_object(path, ConfigError, "Do this.")
    path.write_text('{"a": [1]}')
    assert read_json_object(path, ConfigError, "Do this.") == {"a": [1]}
    for content, words in (
        (b"[1]", "got [1], expected a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_json_object(path, ConfigError, "Do this.")
        assert str(path) in str(caught.value)
        assert words in str(caught.value)
        assert str(caught.value).endswith(" Do this.")


def test_a_file_too_large_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(JSON_BYTES_MAX * 100)
    with pytest.raises(ConfigError, match=f"more than {JSON_BYTES_MAX} bytes"):
        read_json_object(path, ConfigError, "Do this.")


@pytest.mark.timeout(10)
def test_only_regular_files_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"abc"
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for path in (
        tmp_path,
        tmp_path / "pipe",
        Path("/dev/zero"),
        tmp_path / "a\0b",
        tmp_path / "\ud800",
        tmp_path / "none",
    ):
        with pytest.raises(OSError):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208


def test_what_is_shown_is_short_and_escaped() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value in (
        "x" * 10**6,
        "\x1b[2J\n\ud800",
        deep,
        [10**300] * 10**5,
        {"a": "b" * 9999} | dict.fromkeys(range(999)),
        10**4000,
    ):
        assert len(shown(value)) < 1200
        assert shown(value).isprintable()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_asks_to_stop_comes_by_what_tidies_up(number: signal.Signals) -> None:
    before, tidied = signal.getsignal(number), []
    with pytest.raises(SystemExit) as stopped, stoppable():
        try:
            os.kill(os.getpid(), number)
        finally:
            with undisturbed():
                os.kill(os.getpid(), number)
                tidied.append(number)
    assert stopped.value.code == 128 + number and tidied == [number]
    assert signal.getsignal(number) is before


def test_a_trial_file_has_its_size_and_goes_when_a_run_is_ended(tmp_path: Path) -> None:
    told: list[Path] = []
    with pytest.raises(SystemExit), trial_file(tmp_path, ".trial-", (16 << 20) + 5, told.append) as file:
        assert told == [file] and file.stat().st_size == (16 << 20) + 5
        os.kill(os.getpid(), signal.SIGTERM)
    assert not list(tmp_path.iterdir())

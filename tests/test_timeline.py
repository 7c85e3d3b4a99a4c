"""The picture of a pass: every span drawn, serial beside streamed, as a PNG of the size meant for print."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from mhaffn.config import Sublayer, order
from mhaffn.errors import ConfigError
from mhaffn.timeline import COLOURS, DPI, INCHES, draw, figure, one_after_the_other
from mhaffn.trace import PassSpan, Trace

LAYERS = 3
READ_S, COPY_S = {"mha": 0.064, "ffn": 0.129}, {"mha": 0.007, "ffn": 0.014}
COMPUTE_S = {"mha": 0.152, "ffn": 0.026}


@pytest.fixture
def trace() -> Trace:
    """A prefill and two decode passes, streamed: reads never stop, copies follow, compute follows them."""
    made, read_s, compute_s = Trace(), 0.0, 0.0
    for number in (1, 2, 3):
        start_s = compute_s
        for sublayer in order(LAYERS):
            kind = sublayer.kind
            made.add("ssd", sublayer, number, read_s, read_s + READ_S[kind], 100)
            read_s += READ_S[kind]
            made.add("h2d", sublayer, number, read_s, read_s + COPY_S[kind], 100)
            compute_s = max(compute_s, read_s + COPY_S[kind])
            made.add(kind, sublayer, number, compute_s, compute_s + COMPUTE_S[kind])
            compute_s += COMPUTE_S[kind]
        made.passes.append(PassSpan(number, "prefill" if number == 1 else "decode", 7, start_s, compute_s))
    return made


def test_a_png_for_print(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "ein Bild äöü.png"
    draw(trace, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (int(INCHES[0] * DPI), int(INCHES[1] * DPI))
    assert len(set(content[-20000:])) > 50, "not an empty picture"


def test_serial_beside_streamed(trace: Trace) -> None:
    drawn = figure(trace, 2)
    above, below = drawn.axes
    serial_ms = 1e3 * LAYERS * sum(sum(part.values()) for part in (READ_S, COPY_S, COMPUTE_S))
    assert above.get_title(loc="left") == f"one after the other: {serial_ms:.1f} ms"
    run = trace.passes[1]
    streamed_ms = 1e3 * (run.end_s - run.start_s)
    assert f"streamed: {streamed_ms:.1f} ms, {serial_ms / streamed_ms:.2f}× faster" == below.get_title(loc="left")
    for axes in (above, below):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["SSD", "H2D", "MHA", "FFN"]
        assert axes.get_xlim() == (0, pytest.approx(serial_ms))
    bars = sum(len(collection.get_paths()) for collection in above.collections)
    assert bars == 6 * LAYERS, "a read, a copy and a compute for each of two sublayers a layer"
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [
        "MHA sublayers", "FFN sublayers", "for the next pass"
    ]  # fmt: skip


def test_the_last_decode_pass_is_drawn_unless_another_is_asked_for(trace: Trace) -> None:
    assert "decode, 7 tokens, pass 3" in figure(trace).get_suptitle()
    assert "prefill, 7 tokens, pass 1" in figure(trace, 1).get_suptitle()
    with pytest.raises(ConfigError, match="no whole pass 9; it holds 1, 2, 3"):
        figure(trace, 9)
    with pytest.raises(ConfigError, match="it holds none"):
        figure(Trace())


def test_one_after_the_other_overlaps_nothing(trace: Trace) -> None:
    laid = one_after_the_other([span for span in trace.spans if span.number == 2])
    assert [span.sublayer for span in laid[::3]] == list(order(LAYERS))
    end_s = 0.0
    for span in laid:
        assert span.start_s == pytest.approx(end_s)
        end_s = span.end_s


def test_colours_are_apart_in_grey_too() -> None:
    def grey(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    assert abs(grey(COLOURS["mha"]) - grey(COLOURS["ffn"])) > 0.25


def test_without_matplotlib_the_way_to_get_it_is_named(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'mhaffn\[report\]'"):
        figure(trace)


def test_a_pass_without_compute_cannot_be_drawn() -> None:
    trace = Trace()
    trace.add("ssd", Sublayer(0, "mha"), 1, 0.0, 1.0, 10)
    trace.passes.append(PassSpan(1, "decode", 1, 0.0, 1.0))
    with pytest.raises(ConfigError, match="no compute"):
        figure(trace)


def test_a_pass_that_took_longer_than_its_steps_is_not_called_faster() -> None:
    made = Trace()
    for sublayer, start_s in zip(order(1), (0.0, 0.3), strict=True):
        made.add(sublayer.kind, sublayer, 1, start_s, start_s + 0.1)
    made.passes.append(PassSpan(1, "decode", 1, 0.0, 0.4))
    assert figure(made).axes[1].get_title(loc="left") == "streamed: 400.0 ms, 2.00× as long"

"""Traces: lanes whose spans never overlap, passes that are whole, and a file that opens in Perfetto."""

from __future__ import annotations

import json
import threading
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhaffn.config import Sublayer
from mhaffn.trace import LANES, SPANS_MAX, Lane, Span, Trace

MHA, FFN = Sublayer(0, "mha"), Sublayer(1, "ffn")

times = st.floats(0, 100, allow_nan=False)
spans_in_any_order = st.lists(st.tuples(st.sampled_from(LANES), times, times), max_size=30)


@given(spans=spans_in_any_order)
@settings(max_examples=200, deadline=None)
def test_spans_of_a_lane_never_overlap(spans: list[tuple[Lane, float, float]]) -> None:
    trace = Trace()
    for lane, a, b in spans:
        trace.add(lane, MHA, 1, min(a, b), max(a, b), 5)
    assert len(trace.spans) == len(spans)
    for lane in LANES:
        told = [(min(a, b), max(a, b)) for which, a, b in spans if which == lane]
        kept = [span for span in trace.spans if span.lane == lane]
        assert all(span.start_s <= span.end_s for span in kept)
        assert all(before.end_s <= after.start_s for before, after in pairwise(kept))
        if told:
            passed = max(end for _, end in told) - min(start for start, _ in told)
            assert sum(span.end_s - span.start_s for span in kept) <= passed + 1e-9


def test_a_span_that_began_early_is_cut() -> None:
    trace = Trace()
    trace.add("ssd", MHA, 1, 1.0, 3.0, 10)
    trace.add("ssd", FFN, 1, 2.0, 5.0, 20)
    trace.add("h2d", FFN, 1, 2.0, 5.0, 20)
    assert list(trace.spans) == [
        Span("ssd", MHA, 1, 1.0, 3.0, 10), Span("ssd", FFN, 1, 3.0, 5.0, 20), Span("h2d", FFN, 1, 2.0, 5.0, 20)
    ]  # fmt: skip


def test_a_span_told_late_takes_no_time_twice() -> None:
    trace = Trace()
    trace.add("ssd", MHA, 1, 1.0, 5.0, 10)
    trace.add("ssd", FFN, 1, 2.0, 3.0, 20)
    trace.add("ssd", MHA, 2, 3.0, 6.0, 10)
    assert [(span.start_s, span.end_s) for span in trace.spans] == [(1.0, 5.0), (5.0, 5.0), (5.0, 6.0)]


def test_passes_are_numbered_and_kept_by_phase() -> None:
    trace = Trace()
    with trace.one_pass("prefill", 7):
        trace.add("ssd", MHA, 1, 0.0, 1.0, 10)
        trace.add("ssd", MHA, 2, 1.0, 2.0, 30)  # fetched ahead
    with trace.one_pass("decode", 1):
        trace.add("ssd", FFN, 2, 3.0, 4.0, 5)
    assert [(run.number, run.phase, run.tokens) for run in trace.passes] == [(1, "prefill", 7), (2, "decode", 1)]
    assert all(run.start_s <= run.end_s for run in trace.passes)
    passes, spans = trace.kept("decode")
    assert [run.number for run in passes] == [2]
    assert [(span.sublayer, span.nbytes) for span in spans] == [(MHA, 30), (FFN, 5)]
    assert trace.kept("sweep") == ([], [])


def test_a_pass_that_raises_is_not_recorded() -> None:
    trace = Trace()
    with pytest.raises(KeyError), trace.one_pass("decode", 1):
        raise KeyError
    assert not trace.passes
    with trace.one_pass("decode", 1):
        pass
    assert [run.number for run in trace.passes] == [2]


def test_a_pass_that_lost_a_span_is_left_out() -> None:
    trace = Trace()
    trace.spans = deque(maxlen=3)
    for number in (1, 2, 3):
        with trace.one_pass("decode", 1):
            trace.add("ssd", MHA, number + 1, number, number + 1)  # fetched ahead: lost before its pass's own spans
            trace.add("mha", MHA, number, number, number + 1)
    passes, spans = trace.kept("decode")
    assert [span.number for span in trace.spans] == [2, 4, 3]
    assert [run.number for run in passes] == []
    assert spans == []


def test_memory_is_bounded() -> None:
    assert Trace().spans.maxlen == Trace().passes.maxlen == SPANS_MAX


def test_threads_lose_nothing() -> None:
    trace = Trace()

    def work(lane: Lane) -> None:
        for i in range(1000):
            trace.add(lane, MHA, 1, i, i + 1, 1)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in LANES for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(span.nbytes for span in trace.spans) == 1000 * len(threads)


def test_chrome_trace(tmp_path: Path) -> None:
    trace = Trace()
    with trace.one_pass("prefill", 3):
        for i, lane in enumerate(LANES):
            trace.add(lane, FFN, 1, i, i + 0.5, 100)
    trace.write_chrome(tmp_path / "trace.json")
    values = json.loads((tmp_path / "trace.json").read_text())
    assert values["displayTimeUnit"] == "ms"
    names = {e["tid"]: e["args"]["name"] for e in values["traceEvents"] if e["ph"] == "M"}
    assert names == dict(enumerate(("pass", *LANES)))
    spans = [event for event in values["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(LANES) + 1
    for i, event in enumerate(spans[:-1]):
        assert (event["tid"], event["name"], event["ts"], event["dur"]) == (i + 1, "layer 1 ffn", i * 1e6, 5e5)
        assert event["args"] == {"bytes": 100, "pass": 1}
    assert (spans[-1]["tid"], spans[-1]["name"]) == (0, "prefill (3 tokens)")

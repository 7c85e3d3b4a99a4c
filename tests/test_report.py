"""Reports: what each lane did, and which link compute waited for."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mhaffn.config import Sublayer
from mhaffn.report import NEITHER_LINK, Report, make_report, render
from mhaffn.simulate import Prediction
from mhaffn.trace import LANES, Check, PassSpan, Trace

MHA, FFN = Sublayer(0, "mha"), Sublayer(0, "ffn")
SSD, COPY = "SSD → host", "host → device"


def report_of(trace: Trace, *passes: tuple[float, float], **options: object) -> Report:
    for number, (start_s, end_s) in enumerate(passes, start=1):
        trace.passes.append(PassSpan(number, "decode", 1, start_s, end_s))
    report = make_report(trace, "decode", **options)  # type: ignore[arg-type]
    assert report is not None
    return report


def shown(report: Report) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render([report], None))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pass_that_never_waits() -> None:
    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 1.0, 10)
    trace.add("mha", MHA, 1, 1.0, 2.0)
    trace.add("ffn", FFN, 1, 2.0, 4.0)
    report = report_of(trace, (1.0, 4.0))
    assert report.waits == {}
    assert report.busy == {SSD: 0.0, "compute": 3.0}
    assert "compute stood still 0.0 ms a pass, 0% of it\n" in shown(report)


def test_the_wait_for_a_read_and_for_its_last_copy() -> None:
    """Copies follow the read chunk by chunk: only the last one is waited for by itself."""
    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 3.0, 30)
    for start_s in (1.0, 2.0, 3.0):
        trace.add("h2d", MHA, 1, start_s, start_s + 0.25, 10)
    trace.add("mha", MHA, 1, 3.5, 4.0)
    report = report_of(trace, (0.5, 4.0))
    assert report.waits == {SSD: 2.5, COPY: 0.25, NEITHER_LINK: 0.25}


def test_copies_that_fall_behind_the_read_are_the_cause() -> None:
    """The SSD delivers two chunks a second, the copy takes one."""
    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 4.0, 80)
    for chunk in range(8):
        trace.add("h2d", MHA, 1, 0.5 + chunk, 1.5 + chunk, 10)
    trace.add("mha", MHA, 1, 8.5, 9.0)
    assert report_of(trace, (0.0, 9.0)).waits == {SSD: 0.5, COPY: 8.0}


def test_a_sublayer_from_dram_waits_for_its_copy_alone() -> None:
    trace = Trace()
    trace.add("mha", MHA, 1, 0.0, 1.0)
    trace.add("h2d", FFN, 1, 0.5, 3.0, 10)
    trace.add("ffn", FFN, 1, 3.0, 3.5)
    assert report_of(trace, (0.0, 3.5)).waits == {COPY: 2.0}


def test_waits_are_means_over_passes_and_know_them_apart() -> None:
    """What was fetched ahead belongs to the next pass; the time between two passes to neither link."""
    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 1.0, 10)
    trace.add("mha", MHA, 1, 1.0, 2.0)
    trace.add("ssd", MHA, 2, 1.0, 2.0, 10)
    trace.add("mha", MHA, 2, 3.5, 4.0)
    trace.add("ssd", MHA, 3, 2.0, 6.0, 10)
    trace.add("mha", MHA, 3, 6.0, 7.0)
    report = report_of(trace, (0.5, 2.0), (3.0, 4.0), (4.0, 7.0))
    assert report.waits == {SSD: pytest.approx(2.5 / 3), NEITHER_LINK: pytest.approx(0.5 / 3)}


times = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(st.sampled_from(LANES), st.sampled_from([MHA, FFN]), times, times), max_size=30))
def test_waits_are_the_time_compute_stood_still(spans: list[tuple[str, Sublayer, float, float]]) -> None:
    trace = Trace()
    for lane, sublayer, a, b in spans:
        kept = Sublayer(0, lane) if lane in ("mha", "ffn") else sublayer  # type: ignore[arg-type]
        trace.add(lane, kept, 1, min(a, b), max(a, b), 5)  # type: ignore[arg-type]
    report = report_of(trace, (0.0, 100.0))
    computes = sorted((span for span in trace.spans if span.lane in ("mha", "ffn")), key=lambda span: span.start_s)
    idle_s = still_s = 0.0
    for span in computes:
        still_s += max(0.0, span.start_s - idle_s)
        idle_s = max(idle_s, span.end_s)
    assert sum(report.waits.values()) == pytest.approx(still_s)
    assert all(seconds > 0 for seconds in report.waits.values())


def test_predicted_measured_bound_and_share_stand_side_by_side() -> None:
    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 0.8, 10)
    trace.add("h2d", MHA, 1, 0.8, 0.9, 10)
    trace.add("mha", MHA, 1, 0.9, 1.0)
    predicted = Prediction(seconds=0.9, ssd_s=0.75, h2d_s=0.1, compute_s=0.05)
    text = shown(report_of(trace, (0.0, 1.0), predicted=predicted))
    rows = {line[2:15].strip(): line[15:].split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["ms a pass"] == ["predicted", "measured", "bound", "share"]
    assert rows[SSD] == ["750.0", "800.0", "750.0", "75%"]
    assert rows[COPY] == ["100.0", "100.0", "100.0", "10%"]
    assert rows["compute"] == ["50.0", "100.0", "50.0", "5%"]
    assert "bound     750.0 ms, by SSD → host, predicted: 75% of it reached" in text
    assert "waited    compute stood still 900.0 ms a pass, 90% of it, for SSD → host 800.0 ms" in text
    alone = {"SSD → host → device": 0.7, "compute": 0.04}
    text = shown(report_of(trace, alone=alone, predicted=predicted))
    assert "bound     700.0 ms, by SSD → host → device, measured alone: 70% of it reached" in text


def test_the_cpu_time_of_checksums_is_told_apart_where_there_are_any() -> None:
    trace = Trace()
    for number in (1, 2, 3):  # the third is fetched ahead, for a pass that does not come
        trace.add("ssd", MHA, number, number - 1.0, number - 0.5, 3_000_000_000)
        trace.add_check(Check(MHA, number, 3_000_000_000, 0.375, number - 0.4))
    report = report_of(trace, (0.0, 1.0), (1.0, 2.0))
    assert report.checks is not None and (report.checks.nbytes, report.checks.cpu_s) == (3e9, 0.375)
    assert "checksums 375.0 ms of CPU a pass, 8.0 GB/s a core\n" in shown(report)
    assert report.to_dict()["checks"] == {"nbytes": 3e9, "cpu_s": 0.375, "gb_per_s_of_core": 8.0}

    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 0.5, 10)
    unchecked = report_of(trace, (0.0, 1.0))
    assert unchecked.checks is None and unchecked.to_dict()["checks"] is None and "checksums" not in shown(unchecked)


def test_what_a_checksum_holds_back_is_put_down_to_it() -> None:
    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 0.5, 10)
    trace.add_check(Check(MHA, 1, 10, 0.4, 0.75))
    trace.add("mha", MHA, 1, 0.875, 1.0)
    assert report_of(trace, (0.0, 1.0)).waits == {SSD: 0.5, "checksums": 0.25, "neither link": 0.125}


def test_json_has_every_figure() -> None:
    trace = Trace()
    trace.add("ssd", MHA, 1, 0.0, 0.5, 10)
    trace.add("mha", MHA, 1, 0.5, 1.0)
    values = json.loads(json.dumps(report_of(trace, (0.0, 1.0)).to_dict()))
    assert values["waits_s"] == {SSD: 0.5} and values["predicted"] is None
    assert values["busy_s"] == {SSD: 0.5, "compute": 0.5}
    assert values["share_of_bound"] == 0.5

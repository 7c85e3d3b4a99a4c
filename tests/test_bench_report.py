"""What is made of measured times: derived figures, the document in both languages, figures, comparisons."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mhaffn.cli
from mhaffn.bench import document, figures, files
from mhaffn.bench.compare import Difference, compare, regressions, remarks, render
from mhaffn.bench.read import Report
from mhaffn.bench.rounds import Measurement, schedule
from mhaffn.bench.words import WORDS, Words
from mhaffn.errors import ConfigError
from mhaffn.samples import BETWEEN_RUNS, figure, summarise
from tests.bench_reports import SEED_MS, check_derived, report_of

REPORTS = Path(__file__).resolve().parent.parent / "docs" / "reports"
NEAR = 0.011  # the figures are sums and differences of inputs rounded to 0.01 ms


@pytest.fixture(scope="module")
def seed() -> dict[str, Any]:
    return report_of()


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*", text)


def changed(medians: dict[str, float], **more: Any) -> Report:
    return Report(report_of(SEED_MS | medians, **more))


def verdicts(found: list[Difference]) -> dict[str, str]:
    return {item.name: item.verdict for item in found if item.verdict != "same"}


def test_the_derived_figures_are_those_published_with_the_times(seed: dict[str, Any]) -> None:
    got = {name: values["value"] for name, values in seed["derived"].items()}
    published = {
        "prefill.compute": 178.36, "prefill.serial": 391.88, "prefill.ideal": 294.96, "prefill.wait.ffn": 116.60,
        "prefill.bound.mha": 152.42, "prefill.bound.ffn": 142.54, "prefill.io.mha": 70.97, "prefill.bound": 193.24,
        "decode.serial": 215.77, "decode.ideal": 213.51, "decode.wait.mha": 70.28, "decode.wait.ffn": 140.97,
        "decode.bound": 193.24, "split_minus_whole.compute.prefill": 5.44, "split_minus_whole.compute.decode": -0.19,
        "split_minus_whole.h2d": -0.04, "split_minus_whole.ssd": 3.45,
    }  # fmt: skip
    for name, value in published.items():
        assert got[name] == pytest.approx(value, abs=NEAR), name
    assert (got["decode.prefetch.mha"], got["decode.prefetch.ffn"]) == (104, 91)
    shares = {
        "prefill.share.mha": 0.855, "decode.share.ffn": 0.697, "prefill.serial_share.compute.mha": 0.389,
        "decode.serial_share.ssd.ffn": 0.598, "prefill.ideal_speedup": 1.33, "decode.ideal_speedup": 1.01,
    }  # fmt: skip
    for name, value in shares.items():
        assert got[name] == pytest.approx(value, abs=0.006), name
    assert got["rate.h2d.mha"] / 2**30 == pytest.approx(41.74, abs=0.02)
    assert got["rate.ssd.ffn"] / 2**30 == pytest.approx(4.36, abs=0.005)
    assert got["prefill.roof.matmul.mha"] == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize("path", sorted(REPORTS.glob("*/report.json")), ids=lambda path: path.parent.name)
def test_a_report_in_docs_is_what_its_samples_say(path: Path) -> None:
    """Its figures from its samples, and the document from its figures."""
    report = Report.read(path)
    check_derived(report.raw)
    for language, name in (("en", "report.md"), ("zh", "report.zh-CN.md")):
        text = (path.parent / name).read_text(encoding="utf-8")
        assert numbers(text) == numbers(document.write(dict(report.raw), language, figures.NAMES)), name
        assert all((path.parent / f"{figure}.png").exists() for figure in figures.NAMES)


def test_a_made_up_machines_figures_too(seed: dict[str, Any]) -> None:
    check_derived(seed)
    for part in ("value", "low", "high"):
        wrong = copy.deepcopy(seed)
        wrong["derived"]["decode.bound"][part] *= 1.01
        with pytest.raises(AssertionError, match=r"decode\.bound"):
            check_derived(wrong)


def test_every_derived_figure_lies_in_its_interval(seed: dict[str, Any]) -> None:
    for name, found in seed["derived"].items():
        assert found["low"] <= found["value"] <= found["high"], name


def test_an_interval_leaves_out_the_outer_sixths_and_is_never_too_narrow() -> None:
    found = figure([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 100, 1])
    assert (found.value, found.low, found.high) == (14.5, 11, 18)
    steady = figure([5.0] * 12)
    assert steady.uncertainty == pytest.approx(5 * BETWEEN_RUNS)
    assert summarise("roof.ssd", [[1, 3], [2, 2]]).figure.value == 3
    assert summarise("ssd.mha", [[1, 3], [2, 2]]).figure.value == 2


def test_both_languages_carry_the_same_numbers(seed: dict[str, Any]) -> None:
    names = figures.NAMES
    english, chinese = (document.write(seed, language, names) for language in ("en", "zh"))
    assert numbers(english) == numbers(chinese)
    assert len(numbers(english)) > 300
    for line in english.splitlines():  # what is in English only is names
        assert "：" not in line and "，" not in line
    for texts in WORDS.values():
        places = [sorted(re.findall(r"{(\w+)}", text)) for text in texts]
        assert places[0] == places[1]


def test_the_document_follows_the_order_such_measurements_are_read_in(seed: dict[str, Any]) -> None:
    text = document.write(seed, "zh", [])
    heads = [
        "测试环境", "权重大小", "计算时间", "Pin→GPU 传输时间", "SSD→Pin 读取时间", "重叠可行性分析", "关键洞察",
        "优化建议", "与整层测试的对比", "结论",
    ]  # fmt: skip
    places = [text.index(head) for head in heads]
    assert places == sorted(places)
    for piece in ("391.88", "116.61", "1.33×", "1.01×", "104", "0.281 GiB", "151,003,136"):
        assert piece in text


def test_nothing_is_said_of_no_rounds_or_no_layers(seed: dict[str, Any]) -> None:
    """Where no round is left out of an interval, and where one compute hides a transfer."""
    text, few = document.write(seed, "en", figures.NAMES), document.write(report_of(rounds=4), "en", [])
    assert "over all rounds but the 2 lowest and as many of the highest, and" in text and "over all rounds, and" in few
    assert "**MHA**: one transfer takes less time than one of its own computes" in text
    assert "**FFN**: one transfer takes as long as 5 of its own computes" in text
    for name in figures.NAMES:
        assert "\n\n![" in text[: text.index(f"({name}.png)")].rpartition("]")[0][-80:], "a paragraph of its own"


def test_the_published_width_stands_beside_the_measured_one(seed: dict[str, Any]) -> None:
    """F 28672 instead of 12288: by hand, all from SSD, which the links bound."""
    rows = {name: found[0] for name, found in seed["outlook"].items()}
    assert set(rows) == {"ssd", "memory", "published_ssd", "published_memory"}
    norm = 2 * 8192
    mha, ffn, published = 151003136 * 2, 3 * 8192 * 12288 * 2 + norm, 3 * 8192 * 28672 * 2 + norm
    ssd_s = SEED_MS["ssd.row"] / 1e3 / (mha + ffn)  # a byte
    for name, nbytes in (("ssd", mha + ffn), ("published_ssd", mha + published)):
        assert rows[name]["off_device_bytes"] == 80 * nbytes
        assert rows[name]["seconds"]["decode"] == pytest.approx(80 * nbytes * ssd_s, rel=0.01)
        assert rows[name]["binding"]["decode"] == "SSD"
    for language in ("en", "zh"):
        text = document.write(seed, language, [])
        assert "F 28672" in text if language == "en" else "F 为 28672" in text
        assert f"{rows['published_memory']['seconds']['decode']:.3f}" in text
    other = report_of() | {"settings": seed["settings"] | {"shape": "llama3-70b"}}
    assert Report(other).facts.published is None


def test_what_to_change_follows_from_the_times() -> None:
    """The text follows the gains."""
    raw = report_of()
    for item in raw["outlook"]["memory"]:
        item["gain"] = {"prefill": 1.0, "decode": 3.25 if item["name"] == "SSD twice as fast" else 1.0}
    text = document.write(raw, "en", [])
    assert "decode: of what mhaffn can do today, this helps most: SSD twice as fast, 3.25×." in text
    assert "Within memory: prefill: none of the changes" in text
    assert "All from SSD: prefill: of what mhaffn can do today, this helps most:" in text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_figures_are_drawn(seed: dict[str, Any], language: Any, tmp_path: Path) -> None:
    names, remarks = figures.draw(seed, tmp_path, language)
    assert set(remarks) <= {"no_chinese_font"}
    for name in names:
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) > 10_000


@pytest.mark.parametrize("slower", [1, 400])
def test_what_a_figure_says_lies_where_it_belongs(slower: int) -> None:
    """On a machine that reaches its roofs, and on one that comes nowhere near."""
    times = {name: ms * (slower if name.startswith("compute") else 1) for name, ms in SEED_MS.items()}
    report, words = Report(report_of(times | {"ssd.mha": 40.0, "h2d.ffn": 43.0})), Words("en")
    roofline = figures._roofline(report, words)
    roofline.draw_without_rendering()
    (axis,) = roofline.axes
    inside = axis.get_window_extent()
    assert len(axis.texts) == 6
    assert all(inside.y0 < text.get_window_extent().y0 < inside.y1 for text in axis.texts)
    shares = figures._shares(report, words)
    shares.draw_without_rendering()
    for axis in shares.axes:
        bars = [bar.get_window_extent() for bar in axis.patches]
        for label in (text.get_window_extent() for text in axis.texts):
            assert any(bar.x0 <= label.x0 and label.x1 <= bar.x1 for bar in bars)


def test_a_timeline_says_how_long_each_link_was_at_work(seed: dict[str, Any]) -> None:
    drawn = figures._timelines(Report(seed), Words("en"))
    serial, executed = ([label.get_text() for label in axis.get_yticklabels()] for axis in drawn.axes[2:])
    assert serial == ["SSD → pinned: 193.24 ms", "pinned → GPU: 20.28 ms", "compute: 2.25 ms"]
    layers = {"SSD → pinned": 4 * 193.24, "pinned → GPU": 4 * 20.28, "compute": 4 * 2.25}
    assert executed == [f"{name}: {ms:.2f} ms" for name, ms in layers.items()]
    short = [bar for bar in drawn.axes[2].collections if bar.get_paths()[0].get_extents().width < 2]
    assert len(short) == 2 and all(bar.get_linewidth() == 0 for bar in short), "an edge would hide what is so thin"


def test_without_matplotlib_the_document_says_so(
    seed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = files.write(copy.deepcopy(seed), tmp_path, "en")
    assert [path.name for path in written] == ["report.md", "report.json"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "matplotlib is not installed" in text and "![" not in text


def test_the_same_machine_twice_is_the_same(seed: dict[str, Any]) -> None:
    again = Report(report_of(spread=0.006, outlook=False))
    assert verdicts(compare(Report(seed), again)) == {}
    assert remarks(Report(seed), again, []) == []


def test_what_became_slower_or_faster_is_told(seed: dict[str, Any]) -> None:
    second = changed({"compute.decode.ffn": 1.57 * 1.08, "h2d.mha": 6.74 / 1.1}, outlook=False)
    found = compare(Report(seed), second)
    assert verdicts(found) == {"compute.decode.ffn": "worse", "h2d.mha": "better"}
    assert [item.name for item in regressions(found, 5)] == ["compute.decode.ffn"]
    assert regressions(found, 10) == []


def test_a_great_slow_down_is_told_on_a_noisy_machine_too(seed: dict[str, Any]) -> None:
    """Every fourth round was disturbed, and took three times as long."""
    second = report_of(SEED_MS | {"compute.decode.ffn": 1.57 * 12}, outlook=False)
    for number, samples in enumerate(second["measured"]["compute.decode.ffn"]):
        samples[:] = [ms * (3 if number % 4 == 0 else 1) for ms in samples]
    there, back = compare(Report(seed), Report(second)), compare(Report(second), Report(seed))
    assert verdicts(there) == {"compute.decode.ffn": "worse"}
    assert verdicts(back) == {"compute.decode.ffn": "better"}


def test_a_machine_that_was_slower_itself_is_not_blamed_on_the_code(seed: dict[str, Any]) -> None:
    """The disk alone reads a third slower, and so do we."""
    slower = {name: ms * 1.5 for name, ms in SEED_MS.items() if name.startswith("ssd.")}
    second = changed(slower | {"roof.ssd": SEED_MS["roof.ssd"] / 1.5}, outlook=False)
    found = compare(Report(seed), second)
    assert set(verdicts(found).values()) == {"machine"}
    assert regressions(found, 0) == []
    assert any("busy machine" in line for line in remarks(Report(seed), second, found))


def test_time_spent_waiting_for_a_processor_is_not_blamed_on_the_code(seed: dict[str, Any]) -> None:
    second = report_of(SEED_MS | {"compute.decode.mha": 0.68 * 2}, outlook=False)
    assert verdicts(compare(Report(seed), Report(second))) == {"compute.decode.mha": "worse"}
    second["waited"] = {"compute.decode.mha": [0.5] * 12}
    assert verdicts(compare(Report(seed), Report(second))) == {"compute.decode.mha": "machine"}


def test_two_machines_are_compared_by_their_times(seed: dict[str, Any]) -> None:
    other = {name: ms * 1.5 for name, ms in SEED_MS.items() if name.startswith("ssd.")}
    second = changed(other | {"roof.ssd": SEED_MS["roof.ssd"] / 1.5}, machine="RTX 4090", outlook=False)
    found = compare(Report(seed), second)
    assert verdicts(found)["ssd.mha"] == "worse"
    assert any("two different machines" in line for line in remarks(Report(seed), second, found))


def test_reports_of_different_things_are_not_compared(seed: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(seed)
    other["settings"]["tokens"] = 512
    with pytest.raises(ConfigError, match="tokens is 2048 and 512"):
        compare(Report(seed), Report(other))
    (tmp_path / "no.json").write_text("{}")
    for path in (tmp_path / "no.json", tmp_path / "missing.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="report"):
            Report.read(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("measured", {"ssd.mha": [[float("nan")] * 2] * 4}), ("measured", {"ssd.mha": [[float("inf")]]}),
        ("measured", {"ssd.mha": [[0.0]] * 4}), ("measured", {"ssd.mha": []}), ("measured", {"ssd.mha": [[]]}),
        ("measured", {"ssd.mha": "x"}), ("measured", {"ssd.mha": [["1"]]}), ("measured", {"ssd.mha": [[True]]}),
        ("measured", {"ssd.mha": [1.0]}), ("machine", []), ("settings", None), ("derived", 3),
        ("machine", {}), ("settings", {}), ("config", {}), ("config", {"layers": 3}), ("config", None),
        ("left_out", None), ("left_out", [3]), ("left_out", [{"what": ["noisy"], "why": ""}]), ("waited", None),
        ("waited", {"ssd.mha": [1.0]}), ("waited", {"ssd.mha": ["x"]}), ("format", 2),
    ],
)  # fmt: skip
def test_a_damaged_report_is_refused(part: str, value: Any, seed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    raw = dict(seed) | {part: {**seed["measured"], **value} if part == "measured" else value}
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"report\.json.*got .* expected"):
        Report.read(path)


def test_a_report_without_some_part_is_refused_or_compared(seed: dict[str, Any], tmp_path: Path) -> None:
    """Whatever is missing, and whatever looks like markup."""
    path, good = tmp_path / "report.json", changed({"ssd.mha": 90.0}, outlook=False)

    def outcome(raw: dict[str, Any]) -> str:
        path.write_text(json.dumps(raw))
        try:
            found = compare(Report.read(path), good)
            remarks(good, Report.read(path), found)
            Console(file=io.StringIO()).print(render(Report.read(path), good, found))
        except ConfigError:
            return "refused"
        return "compared"

    parts = [(part,) for part in seed]
    parts += [(part, key) for part in ("machine", "settings", "config") for key in seed[part]]
    for part, *keys in parts:
        damaged = copy.deepcopy(seed)
        del (damaged[part] if keys else damaged)[keys[0] if keys else part]
        assert outcome(damaged) in ("refused", "compared")
    marked = copy.deepcopy(seed)
    marked["machine"]["commit"], marked["left_out"] = "[/]", [{"what": "noisy", "why": "[/]"}]
    assert outcome(marked) == "compared"


def test_what_only_one_run_measured_is_told(seed: dict[str, Any]) -> None:
    second = report_of({name: ms for name, ms in SEED_MS.items() if not name.endswith(".whole")}, outlook=False)
    found = compare(Report(seed), Report(second))
    assert {item.name for item in found} == second["measured"].keys()
    expected = "run 1 alone has pass.decode.whole, pass.prefill.whole: nothing to hold it against"
    assert remarks(Report(seed), Report(second), found) == [expected]


def test_other_disks_are_told(seed: dict[str, Any]) -> None:
    second = report_of(outlook=False)
    second["machine"]["disk"] = {"device": "/dev/loop0", "file_system": "ext4", "model": "a file on tmpfs"}
    assert any("two different disks" in line for line in remarks(Report(seed), Report(second), []))


def test_the_command_compares_and_fails_on_regressions(
    seed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    second = changed({"ssd.ffn": 129.01 * 1.3}, outlook=False).raw | {
        "left_out": [{"what": "noisy", "why": "ssd [/] ±12%"}]
    }
    for path, raw in zip(paths, (seed, second), strict=True):
        path.write_text(json.dumps(raw))

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["mhaffn", "bench", "--compare", *map(str, (*paths, *arguments))])
        with pytest.raises(SystemExit) as stop:
            mhaffn.cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out + err

    code, text = run()
    assert code == 0 and "WORSE" in text and "+30.0%" in text and "ssd [/] ±12%" in text
    code, text = run("--fail-on-regression", 10)
    assert code == 1 and "regression: ssd.ffn +30.0%" in text
    assert run("--fail-on-regression", 40)[0] == 0


def measurement(name: str) -> Measurement:
    take: Callable[[int], list[float]] = lambda n: [1.0] * n  # noqa: E731
    return Measurement(name, take)


def test_a_schedule_keeps_to_its_time() -> None:
    quick, slow = measurement("quick"), measurement("slow")
    plan = schedule([(quick, 0.05), (slow, 0.5)], 30.0, 12, 4)
    assert plan.rounds == 12 and 0.8 * 30 < plan.expected_s <= 30
    plan = schedule([(quick, 0.001), (slow, 5.0)], 30.0, 12, 4)
    assert plan.rounds == 5 and [step.samples for step in plan.steps][1] == 1
    assert schedule([(slow, 100.0)], 30.0, 12, 4).rounds == 4

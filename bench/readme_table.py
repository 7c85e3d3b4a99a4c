"""Writes the README's tables from the files under bench/results, in both languages.

python bench/readme_table.py           rewrites what stands between the marks: of streams, and of operations
python bench/readme_table.py --check   exits with 1 where a README differs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from results_ops import comparisons, machine_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}
MARKS = ("table", "ops")
OPERATIONS = (
    "ffn 70B M=1",
    "ffn 70B M=16",
    "ffn 70B M=2048",
    "prefill causal T=2048",
    "prefill causal T=8192",
    "decode B=1 S=8192",
    "decode B=1 S=32768",
    "decode B=8 S=8192",
    "rms_norm T=2048",
    "rope T=2048",
    *(f"linear int4 g128 up M={m}" for m in (1, 16, 64, 512)),
    *(f"linear {kind} row up M=1" for kind in ("int8", "fp8")),
    *(f"8b {phase}" for phase in ("prefill", "step", "generate")),
)
"""Cases that the table of operations shows, where a GPU's results hold them."""
OPERATION_HEADS = {
    "en": ("machine", "case", "mhaffn, ms", "best other", "its ms", "times as fast", "of the roof"),
    "zh": ("机器", "用例", "mhaffn，毫秒", "最快的其他实现", "毫秒", "速度倍数", "达到上限的"),
}
HEADS = {
    "en": ("machine", "what streams", "s a pass", "GiB/s", "bound, by", "reached"),
    "zh": ("机器", "流式内容", "每遍秒数", "GiB/s", "下界，受限于", "达到"),
}
WORDS = {
    "zh": {
        "SSD only": "全部来自 SSD", "DRAM only": "全部来自内存", "half DRAM, half SSD": "一半内存，一半 SSD",
        "a third GPU, rest DRAM": "三分之一常驻 GPU，其余在内存", "decode": "解码", "prompt of": "提示长度",
        "layers of 70B width": "层，70B 宽度", "tokens": "个词元", "SmolLM2-135M, all layers from SSD":
        "SmolLM2-135M，所有层来自 SSD", "compute": "计算", "ssd": "SSD", "h2d": "主机→GPU 拷贝", "SSD → host": "SSD",
        "SSD → host → device": "SSD→主机→GPU",
    },
    "en": {"ssd": "SSD", "h2d": "host→GPU copy", "SSD → host": "SSD", "SSD → host → device": "SSD→host→GPU"},
}  # fmt: skip


def rows() -> list[dict[str, object]]:
    """One row a measurement: text parts in English, numbers as numbers."""
    found: list[dict[str, object]] = []
    for path in sorted(RESULTS.glob("demo-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        (decode,) = (report for report in values["reports"] if report["phase"] == "decode")
        nbytes = sum(row["nbytes"] for row in decode["rows"] if row["lane"] == "ssd")
        found.append(
            {
                "machine": machine_name(values["machine"]),
                "what": ["SmolLM2-135M, all layers from SSD"],
                "seconds": decode["seconds_per_pass"],
                "rate": nbytes / decode["seconds_per_pass"] / 2**30,
                "bound": decode["bound_s"],
                "link": decode["bound_link"],
                "share": decode["share_of_bound"],
            }
        )

    for path in sorted(RESULTS.glob("stream-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        formats = sorted(set(values.get("formats", [])[1::2]))
        width = [", " + " / ".join(formats)] if formats else []
        for row in values["rows"]:
            if row["bound_link"] == "ssd":  # a loop disk on tmpfs: its own speed moves more than what is to be shown
                continue
            phase = ["decode"] if row["tokens"] == 1 else ["prompt of", f" {row['tokens']} ", "tokens"]
            found.append(
                {
                    "machine": machine_name(values["machine"]),
                    "what": [f"{row['layers']} ", "layers of 70B width", *width, ", ", row["mix"], ", ", *phase],
                    "seconds": row["seconds"],
                    "rate": row["gib_per_s"],
                    "bound": row["bounds"][row["bound_link"]],
                    "link": row["bound_link"],
                    "share": 1 / row["ratio"],
                }
            )
    return found


def table(language: str) -> str:
    """The Markdown table in ``language``."""
    words = WORDS[language]
    lines = ["| " + " | ".join(HEADS[language]) + " |", "|---|---|---|---|---|---|"]
    for row in rows():
        what = "".join(words.get(part, part) for part in row["what"])  # type: ignore[attr-defined]
        link = words.get(str(row["link"]), str(row["link"]))
        lines.append(
            f"| {row['machine']} | {what} | {row['seconds']:.3f} | {row['rate']:.2f} "
            f"| {row['bound']:.3f}, {link} | {row['share']:.0%} |"
        )
    return "\n".join(lines)


def operations(language: str) -> str:
    """The Markdown table of operations, those of :data:`OPERATIONS`."""
    heads = OPERATION_HEADS[language]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---:|---|---:|---:|---:|"]
    shown = [item for item in comparisons(RESULTS) if item.ours.case in OPERATIONS and "CPU" not in item.ours.machine]
    for item in sorted(shown, key=lambda item: (item.ours.machine, OPERATIONS.index(item.ours.case))):
        ours, best = item.ours, item.best
        other = [best.implementation, f"{best.ms:.3f}", f"{best.ms / ours.ms:.2f}×"] if best else ["", "", ""]
        share = f"{ours.share:.0%}" if ours.share is not None else ""
        lines.append("| " + " | ".join([ours.machine, ours.case, f"{ours.ms:.3f}", *other, share]) + " |")
    return "\n".join(lines)


def with_tables(text: str, language: str) -> str:
    """``text`` with each table between its marks, where it has them."""
    tables = {"table": table, "ops": operations}
    for mark in MARKS:
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{tables[mark](language)}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    stale = 0
    for language, path in READMES.items():
        text = path.read_text(encoding="utf-8")
        wanted = with_tables(text, language)
        if text != wanted:
            stale = 1
            if "--check" not in sys.argv:
                path.write_text(wanted, encoding="utf-8")
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

"""The READMEs hold measured figures, and the same ones."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_those_of_the_results() -> None:
    check = subprocess.run([sys.executable, ROOT / "bench" / "readme_table.py", "--check"], cwd=ROOT)
    assert check.returncode == 0, "run: python bench/readme_table.py"


@pytest.mark.parametrize("subject", ["quality", "speculation"])
def test_the_tables_of_a_document_are_those_of_the_results(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as it runs, but in this process, which has imported what it measures with."""
    script = str(ROOT / "bench" / f"{subject}.py")
    monkeypatch.setattr("sys.argv", [script, "--check"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    assert not done.value.code, f"run: python bench/{subject}.py --render"


def test_both_languages_carry_the_same_numbers_and_links() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    tables = [
        re.findall(r"\d+\.\d+|\d+ ?%", text.partition("<!-- table -->")[2].partition("<!-- /")[0]) for text in texts
    ]
    assert tables[0] == tables[1] != []
    links = [set(re.findall(r"\]\((docs/[^)]*)\)", text)) for text in texts]
    assert links[0] == links[1]
    assert all((ROOT / link).exists() for link in links[0])


def test_the_table_of_operations_is_made_of_every_kind_of_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import readme_table

    about = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "cores": 16}
    rows = [("mhaffn.ops.ffn", 0.46), ("Triton few rows", 0.40), ("cuBLAS eager", 0.49), ("gemlite, 16-bit", 0.5)]
    script = {
        "bench": "ffn", "environment": about,
        "rows": [
            *({"shape": "ffn 70B M=1", "implementation": n, "median_ms": ms, "share_of_roof": 0.97} for n, ms in rows),
            {"shape": "ffn 70B M=1", "implementation": "Liger", "failed": "not here: pip install liger-kernel"},
        ],
    }  # fmt: skip
    pytest_file = {
        "machine_info": {"mhaffn": about},
        "benchmarks": [
            {"params": {"case": "rope T=2048", "peer": n}, "stats": {"median": s}, "extra_info": {}}
            for n, s in (("mhaffn.ops.rope", 5e-5), ("PyTorch", 1e-4))
        ] + [
            {"params": {"width": "8b", "case": "prefill", "peer": n}, "stats": {"median": s}, "extra_info": {}}
            for n, s in (("unmodified", 0.06), ("mhaffn.replace", 0.05))
        ],
    }  # fmt: skip
    for name, values in (("ffn", script), ("others", pytest_file)):
        (tmp_path / f"h100-{name}.json").write_text(json.dumps(values))
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    lines = readme_table.operations("en").splitlines()[2:]
    assert lines == [
        "| H100 80GB | ffn 70B M=1 | 0.460 | cuBLAS eager | 0.490 | 1.07× | 97% |",
        "| H100 80GB | rope T=2048 | 0.050 | PyTorch | 0.100 | 2.00× |  |",
        "| H100 80GB | 8b prefill | 50.000 | unmodified | 60.000 | 1.20× |  |",
    ]
    stale = "<!-- ops -->\n| 9.999 |\n<!-- /ops -->\nafter\n"
    assert readme_table.with_tables(stale, "zh").splitlines()[3:] == [*lines, "<!-- /ops -->", "after"]

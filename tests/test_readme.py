"""The READMEs hold measured figures, and the same ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_those_of_the_results() -> None:
    check = subprocess.run([sys.executable, ROOT / "bench" / "readme_table.py", "--check"], cwd=ROOT)
    assert check.returncode == 0, "run: python bench/readme_table.py"


def test_both_languages_carry_the_same_numbers_and_links() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    tables = [
        re.findall(r"\d+\.\d+|\d+ ?%", text.partition("<!-- table -->")[2].partition("<!-- /")[0]) for text in texts
    ]
    assert tables[0] == tables[1] != []
    links = [set(re.findall(r"\]\((docs/[^)]*)\)", text)) for text in texts]
    assert links[0] == links[1]
    assert all((ROOT / link).exists() for link in links[0])

"""Builds of the extension other than the usual one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reader_files import build_package, make_file

READ = """
import json, sys
import mhaffn._native
from mhaffn.errors import EngineUnavailableError
from mhaffn.reader import Extent, PinnedArena, Reader

path = sys.argv[1]
content = open(path, "rb").read()
refusals = []
for options in ({"engine": "io_uring"}, {"strict": True}):
    try:
        Reader(**options)
    except EngineUnavailableError as error:
        refusals.append(str(error))
with PinnedArena(2 << 20, cuda=False) as arena, Reader(arena=arena) as reader, arena.lease(1 << 20) as slot:
    request = reader.submit([Extent(path, 1, len(content) - 1)], slot)
    request.wait(30)
    at = request.placements[0]
    assert bytes(slot)[at : at + len(content) - 1] == content[1:]
    info = reader.info()
print(json.dumps([mhaffn._native.__file__, info.liburing, info.engine, info.reasons, refusals]))
"""


@pytest.mark.slow
def test_without_liburing_the_pool_reads_and_all_say_so(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "liburing.h").write_text("#error not here\n")  # found before the system's
    site, said = build_package(tmp_path, CPPFLAGS=f"-I{hidden}")
    assert "building WITHOUT the io_uring engine" in said and "apt-get install liburing-dev" in said

    make_file(tmp_path / "file", 300_001)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "COLUMNS": "200"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    extension, liburing, engine, reasons, refusals = json.loads(run("-c", READ, str(tmp_path / "file")))
    assert extension.startswith(str(site))
    assert (liburing, engine) == ("none", "threads")
    for text in (*reasons, *refusals):
        assert "built without liburing" in text and "apt-get install liburing-dev" in text
    assert (len(reasons), len(refusals)) == (1, 2)

    examination = run("-m", "mhaffn", "doctor", str(tmp_path))
    assert re.search(r"warn +engine +preadv threads \(liburing none\)", examination), examination
    assert "apt-get install liburing-dev" in examination and "built without liburing" in examination


ARENA = """
import torch
from mhaffn.reader import PinnedArena

with PinnedArena(4 << 20) as arena:
    print(arena.info().huge_page_share)
"""


@pytest.mark.slow
def test_nothing_but_the_module_is_seen_from_outside(tmp_path: Path) -> None:
    """Another copy of the C++ library in the process, such as torch's, must not mix with this one's."""
    site, _ = build_package(tmp_path, LDFLAGS="-static-libstdc++")
    (extension,) = site.glob("mhaffn/_native*.so")
    table = subprocess.run(["nm", "-D", "--defined-only", extension], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in table.stdout.splitlines()] == ["PyInit__native"]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ARENA], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0 and float(done.stdout) >= 0, (done.returncode, done.stderr)

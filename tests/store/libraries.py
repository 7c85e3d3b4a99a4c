"""AutoAWQ's, AutoGPTQ's and GPTQModel's own code for their formats, unmodified, without what it depends on.

The packages want CUDA, other versions of transformers, or much that a test has no use for. So their source packages are
fetched once, the few files that pack and unpack are imported out of them, and whatever else those import is a stand-in.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mhaffn.demo import default_cache


@dataclass(frozen=True)
class Library:
    """A source package, and its modules that are really imported; of ``absent`` packages none is."""

    requirement: str
    archive: str
    sha256: str
    modules: tuple[str, ...]
    absent: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        return self.modules[0].partition(".")[0]

    @property
    def absent_or_ours(self) -> tuple[str, ...]:
        return (self.package, *self.absent)


AUTO_AWQ = Library(
    "autoawq==0.2.9",
    "autoawq-0.2.9.tar.gz",
    "f3397687118c7d23c769de0de05ff1dca8950a2644acbe1b6eb1399c691fe7ee",
    ("awq.modules.linear.gemm", "awq.utils.packing_utils", "awq.utils.module", "awq.utils.utils"),
)
AUTO_GPTQ = Library(
    "auto-gptq==0.7.1",
    "auto_gptq-0.7.1.tar.gz",
    "5c61ad380e9b4c603757c254765e9083a90a820cd0aff1b5d2c6f7fd96c85e80",
    ("auto_gptq.nn_modules.qlinear.qlinear_cuda_old",),
)
GPTQ_MODEL = Library(
    "gptqmodel==7.7.0",
    "gptqmodel-7.7.0.tar.gz",
    "039874c39fb56ba75b750dd4870968e7fe83b6ca28890a53e94ad3c46be699d0",
    (
        "gptqmodel.nn_modules.qlinear.torch", "gptqmodel.nn_modules.qlinear",
        "gptqmodel.nn_modules.qlinear._runtime_cache", "gptqmodel.utils.planar_packing", "gptqmodel.utils.env",
        "gptqmodel.utils.model",
    ),
    absent=("pcre", "threadpoolctl"),
)  # fmt: skip
LIBRARIES = (AUTO_AWQ, AUTO_GPTQ, GPTQ_MODEL)
_NO_MATCH = "DO NOT MATCH THE HASHES"


def fetched(cache: Path | None = None) -> Path:
    """The folder with all archives, fetched where they are not there or are others.

    Skips the test where pip cannot fetch them, and fails it in CI, and wherever what comes is not what was pinned.
    """
    folder = (cache or default_cache()) / "libraries"
    if all(_is_whole(folder / library.archive, library.sha256) for library in LIBRARIES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pinned = Path(scratch) / "requirements.txt"
        pinned.write_text("".join(f"{one.requirement} --hash=sha256:{one.sha256}\n" for one in LIBRARIES))
        # Nothing is installed; that a source package is asked for its metadata needs setuptools and no CUDA.
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--retries", "2"]
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", scratch, "-r", str(pinned)]
        try:
            subprocess.run(
                [*command, *options],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"BUILD_CUDA_EXT": "0"},
            )
        except subprocess.CalledProcessError as error:
            if os.environ.get("CI") or _NO_MATCH in error.stderr:
                pytest.fail(f"pip could not download {pinned.read_text()}: {error.stderr.strip()[-1000:]}")
            pytest.skip(f"AutoAWQ, AutoGPTQ and GPTQModel are not to be had here: {error.stderr.strip()[-300:]}")
        for library in LIBRARIES:
            assert _is_whole(Path(scratch) / library.archive, library.sha256), f"{library.archive} is another file"
            (Path(scratch) / library.archive).rename(folder / library.archive)
    return folder


def _is_whole(archive: Path, sha256: str) -> bool:
    return archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == sha256


def load(library: Library, archives: Path, scratch: Path) -> dict[str, ModuleType]:
    """The library's modules by their names, imported from files put into ``scratch``; none stays in sys.modules."""
    stem = library.archive.removesuffix(".tar.gz")
    wanted = {f"{stem}/{name.replace('.', '/')}{end}" for name in library.modules for end in (".py", "/__init__.py")}
    with tarfile.open(archives / library.archive) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name in wanted else None
            if content is not None:
                (scratch / member.name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / member.name).write_bytes(content.read())
    with _imports_of(library, scratch / stem):
        return {name: importlib.import_module(name) for name in library.modules}


@contextmanager
def _imports_of(library: Library, root: Path) -> Iterator[None]:
    finder = _Finder(library, root)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in library.absent_or_ours]:
            del sys.modules[name]


class _Finder(MetaPathFinder, Loader):
    """Finds a library's wanted modules in ``root``; all else of it, and what it needs and is absent, is a stand-in."""

    def __init__(self, library: Library, root: Path) -> None:
        self.library, self.root = library, root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.library.absent_or_ours:
            return None
        if fullname not in self.library.modules:
            return ModuleSpec(fullname, self, is_package=True)
        file = self.root / f"{fullname.replace('.', '/')}.py"
        if file.exists():
            return spec_from_file_location(fullname, file)
        folder = file.with_suffix("")
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandIn(ModuleType):
    """A module of which every name is :class:`_Anything`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ANYTHING


class _Anything:
    """Stands for whatever is imported and never reached: a logger, a class to derive from, a type in an annotation."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def _itself(self, *_: object, **__: object) -> _Anything:
        return self

    __call__: Callable[..., Any] = _itself
    __or__ = __ror__ = __getitem__ = __enter__ = _itself

    def __exit__(self, *_: object) -> None:
        pass

    def __bool__(self) -> bool:
        return False

    def __mro_entries__(self, _: tuple[type, ...]) -> tuple[type, ...]:
        return ()


_ANYTHING = _Anything()

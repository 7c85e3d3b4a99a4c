"""The package as a whole: which way imports go, what they load, and what a wheel holds."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports only from lines above its own.
LAYERS = [
    ("errors",),
    ("files", "swap"),
    ("config",),
    ("formats",),
    ("quantized",),
    ("quantize", "arguments"),
    ("budget", "_native", "sizes"),
    ("ring", "placement"),
    ("simulate",),
    ("reader", "store", "plan", "trace"),
    ("shapes", "cache"),
    ("image", "device", "forecast", "random_model"),
    ("memory", "verify", "profile", "checksums"),
    ("stream",),
    ("kernels",),
    ("ops",),
    ("attention_interface",),
    ("modules",),
    ("huggingface", "meta"),
    ("runner",),
    ("opening", "streamed"),
    ("hf",),
    ("streamed_huggingface", "streamed_meta"),
    ("replacement",),
    ("measured",),
    ("planning", "machine", "report", "timeline", "samples", "roofs", "inputs"),
    ("probe",),
    ("session", "bench"),
    ("demo", "doctor", "evaluate", "calibrate"),
    ("cli",),
    ("__main__",),
]
STORE_LAYERS = [
    ("manifest", "safetensors", "gguf_header"),
    ("format", "resolve", "layout"),
    ("awq", "gptq", "compressed_tensors", "gguf_blocks"),
    ("gguf", "folder"),
    ("source",),
    ("places",),
    ("claim", "maker"),
    ("pack",),
]
HEAVY = (
    "transformers", "cupy", "rich", "typer", "gguf", "safetensors", "xxhash", "huggingface_hub", "matplotlib",
    "mhaffn.cli",
)  # fmt: skip


def imported(path: Path, package: str) -> Iterator[str]:
    """Every module that ``path``, a module of ``package``, imports anywhere, by its whole name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ranks(layers: list[tuple[str, ...]]) -> dict[str, int]:
    return {name: rank for rank, layer in enumerate(layers) for name in layer}


def check_layers(folder: Path, package: str, layers: list[tuple[str, ...]]) -> None:
    rank, depth = ranks(layers), len(package.split("."))
    for path in sorted(folder.rglob("*.py")):
        owner = path.relative_to(folder).parts[0].removesuffix(".py")
        if owner == "__init__":
            continue
        assert owner in rank, f"{path}: say in LAYERS where {owner} belongs"
        inner = ".".join([package, *path.relative_to(folder).parts[:-1]])
        for name in imported(path, inner):
            parts = name.split(".")
            if name.startswith(f"{package}.") and parts[depth] in rank and parts[depth] != owner:
                assert rank[parts[depth]] < rank[owner], f"{path} imports {name}: that goes the wrong way"


def test_imports_go_one_way() -> None:
    check_layers(ROOT / "mhaffn", "mhaffn", LAYERS)


def test_imports_inside_the_store_go_one_way() -> None:
    check_layers(ROOT / "mhaffn" / "store", "mhaffn.store", STORE_LAYERS)


def test_nothing_imports_the_command_line() -> None:
    for folder in ("mhaffn", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__main__.py" and path.parent.name != "cli":
                assert not any(name.startswith("mhaffn.cli") for name in imported(path, "mhaffn")), path


def test_kernels_import_torch_and_triton_only() -> None:
    """And mhaffn.quantized; the nvrtc modules, which alone drive CuPy, that and the numpy scalars they need."""
    allowed = {"torch", "triton", "mhaffn", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").rglob("*.py"):
        for name in imported(path, "mhaffn.kernels"):
            root = name.partition(".")[0]
            drives = root in ("cupy", "cupy_backends", "numpy") and path.name.startswith("nvrtc")
            assert root in allowed or drives, f"{path} imports {name}"
            inside = name.startswith(("mhaffn.kernels", "mhaffn.quantized"))
            assert root != "mhaffn" or inside, f"{path} imports {name}"


def run(program: str, cwd: Path, **environment: str) -> str:
    """What ``program`` prints, run by this interpreter in ``cwd`` with the package found from there."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_ops_alone_are_light() -> None:
    program = f"import sys, mhaffn.ops; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(program, ROOT) == "[]"


def test_transformers_works_from_the_repository_root() -> None:
    """It looks for a package named kernels, and finds the folder of that name here."""
    program = (
        "import transformers, torch, kernels; from transformers import LlamaConfig, LlamaForCausalLM;"
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,"
        "num_attention_heads=2, num_key_value_heads=1, vocab_size=32, eos_token_id=None));"
        "print(kernels.__file__, tuple(model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2).shape));"
        "print([name for name in vars(kernels) if not name.startswith('__')])"
    )
    assert run(program, ROOT).splitlines()[-2:] == [f"{ROOT}/kernels/__init__.py (1, 4)", "[]"]


def test_every_file_of_the_packages_is_packaged() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in setup["packages"]:
        folder = ROOT / setup["package-dir"].get(package, package.replace(".", "/"))
        patterns = ["*.py", *setup["package-data"].get(package, [])]
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            inner = any(
                (ROOT / other.replace(".", "/")) in path.parents for other in setup["packages"] if other != package
            )
            if path.is_dir() or "__pycache__" in name or path.suffix == ".so" or (package == "mhaffn" and inner):
                continue
            assert any(fnmatch(name, pattern) for pattern in patterns), f"no wheel would hold {path}"
            assert path.suffix != ".py" or "/" not in name, f"{path.parent} is no package in pyproject.toml"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=junk)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    ran = subprocess.run([*command, str(folder), str(folder / "tree")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_a_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder, patterns in (
        ("mhaffn", ("*.py", "*.pyi", "py.typed", "*/*.py")),
        ("kernels", ("*.py", "configs/*.json", "cuda/*.cu", "cuda/*.cuh")),
    ):
        for pattern in patterns:
            for path in (ROOT / folder).glob(pattern):
                name = path.relative_to(ROOT / folder)
                assert f"mhaffn/{'' if folder == 'mhaffn' else 'kernels/'}{name}" in held
    assert any(fnmatch(name, "mhaffn/_native.*.so") for name in held)
    assert not any(name.startswith(("kernels/", "tests/", "csrc/")) for name in held)
    assert any(name.endswith("entry_points.txt") for name in held)


@pytest.mark.slow
def test_an_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    program = (
        "import mhaffn, mhaffn.ops, mhaffn.cli, mhaffn.reader, mhaffn.store;"
        "import mhaffn.kernels.reference as r, mhaffn._native as n;"
        "from importlib.resources import files;"
        "modules = (mhaffn, mhaffn.ops, mhaffn.cli, mhaffn.reader, r, n);"
        "print(len({m.__file__.split('/mhaffn/')[0] for m in modules}), mhaffn.__file__);"
        "print(bool(list(files('mhaffn.kernels').joinpath('configs').iterdir())))"
    )
    assert run(program, tmp_path, PYTHONPATH=str(target)).splitlines() == [f"1 {target}/mhaffn/__init__.py", "True"]
    program = "from mhaffn.cli import main; import sys; sys.argv = ['mhaffn', '--help']; main()"
    assert "pack" in run(program, tmp_path, PYTHONPATH=str(target))


def test_imports_from_the_folder_that_the_clone_lies_in(tmp_path: Path) -> None:
    """There the clone itself looks like a namespace package of the same name."""
    (tmp_path / "mhaffn").symlink_to(ROOT)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import mhaffn; assert mhaffn.__version__; import mhaffn.store"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True, timeout=60)

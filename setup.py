"""Build of the native extension; everything else about the package stands in pyproject.toml.

io_uring comes from liburing: linked statically where its header and archive are found, else shared,
else left out – the preadv engine then reads alone, and both this build and ``mhaffn doctor`` say so.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent
SOURCES = [
    "bindings.cpp",
    "cuda.cpp",
    "device_thread.cpp",
    "file.cpp",
    "layout.cpp",
    "mapping.cpp",
    "numa.cpp",
    "pinned.cpp",
    "reader.cpp",
    "request.cpp",
    "router.cpp",
    "thread_reader.cpp",
]
LIBURING_LINKS = {"static": ["-l:liburing.a"], "shared": ["-luring"]}


class BuildWithLiburing(build_ext):
    """Adds the io_uring engine when liburing links, and says which build came out."""

    def build_extensions(self) -> None:
        linkage = self._liburing_linkage()
        for extension in self.extensions:
            extension.define_macros.append(("MHAFFN_LIBURING", f'"{linkage}"'))
            if linkage == "none":
                continue
            extension.sources.append("csrc/uring_reader.cpp")
            extension.define_macros.append(("MHAFFN_HAS_LIBURING", "1"))
            extension.extra_link_args += LIBURING_LINKS[linkage]
        if linkage == "none":
            print(
                "mhaffn: liburing not found: building WITHOUT the io_uring engine. "
                "To add it: apt-get install liburing-dev, then install mhaffn again."
            )
        else:
            print(f"mhaffn: building with the io_uring engine ({linkage} liburing)")
        super().build_extensions()

    def _liburing_linkage(self) -> str:
        probe = "#include <liburing.h>\nint main() { io_uring ring; return io_uring_queue_init(1, &ring, 0); }\n"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(probe)
            for linkage, libraries in LIBURING_LINKS.items():
                try:
                    objects = self.compiler.compile([str(source)], output_dir=folder)
                    self.compiler.link_shared_object(objects, str(Path(folder) / "probe.so"), extra_postargs=libraries)
                except Exception:  # each compiler class has its own error; any failure means "not here"
                    continue
                return linkage
        return "none"


extension = Pybind11Extension(
    "mhaffn._native",
    [f"csrc/{name}" for name in SOURCES],
    cxx_std=17,
    include_dirs=["csrc"],
    depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.suffix != ".cpp"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
    extra_link_args=["-ldl", "-pthread", f"-Wl,--version-script={ROOT / 'csrc' / 'exports.map'}"],
)

with ParallelCompile("MHAFFN_BUILD_JOBS", default=os.cpu_count() or 1):
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithLiburing})

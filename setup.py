"""The extensions: every .pyx of maia_rt/_fast and of the emulator. Everything else is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

compile_args = ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"]
link_args: list[str] = []
if os.environ.get("MAIA_WERROR"):
    compile_args.append("-Werror")
if os.environ.get("MAIA_SANITIZE"):
    compile_args += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
    link_args += ["-fsanitize=address,undefined"]
# More of them, which have the last word.
compile_args += os.environ.get("MAIA_CFLAGS", "").split()

CSRC = "emulator/maia_emulator/csrc"
# The C beside a .pyx, by the extension's last name, and what its loops need to become vector code.
C_SOURCES = {
    "macro_ops": [f"{CSRC}/numerics.c", f"{CSRC}/conversions.c"],
    "commands": [f"{CSRC}/crc32.c"],
    "lane": ["maia_rt/_fast/csrc/site.c"],
}
VECTOR_ARGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
C_ARGS = {"macro_ops": VECTOR_ARGS}


def extensions(package: str, folder: str) -> list[Extension]:
    """One extension a .pyx, with the project's flags; headers in csrc are found and watched."""
    headers = sorted(str(p) for p in Path(folder, "csrc").glob("*.h"))
    return [
        Extension(
            f"{package}.{path.stem}", [str(path), *C_SOURCES.get(path.stem, [])],
            include_dirs=[f"{folder}/csrc"] if headers else [], depends=headers,
            extra_compile_args=compile_args + C_ARGS.get(path.stem, []), extra_link_args=link_args,
        )
        for path in sorted(Path(folder).glob("*.pyx"))
    ]


# The Makefile builds in place, in parallel, and then installs without building all of it a second time.
built = bool(os.environ.get("MAIA_EXTENSIONS_BUILT"))

setup(
    ext_modules=[] if built else cythonize(
        extensions("maia_rt._fast", "maia_rt/_fast") + extensions("maia_emulator", "emulator/maia_emulator"),
        include_path=[".", "emulator"],
        compiler_directives={"language_level": 3},
        annotate=bool(os.environ.get("MAIA_ANNOTATE")),
    )
)

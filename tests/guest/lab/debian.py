"""Packages of Debian, fetched and unpacked beside the system: a private apt with its own lists and an empty status.

Nothing is installed on the host. Programs of a newer Debian run through that Debian's own dynamic linker.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from . import cache

SUITE = "trixie"
BACKPORTS = "trixie-backports"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_NEEDED = ("apt-get", "apt-cache", "dpkg-deb")


class LabError(Exception):
    """The lab cannot be built or a guest cannot be run here; the text says why and what to try."""


def missing() -> str | None:
    """Why this machine cannot have a lab at all, or None."""
    if os.uname().machine != "x86_64":
        return f"the guest lab runs on x86-64 only, this is {os.uname().machine}"
    absent = [name for name in _NEEDED if shutil.which(name) is None]
    if absent:
        return f"the guest lab is made of Debian's packages, and there is no {', '.join(absent)} here: use Debian"
    return None


def host_suite() -> str:
    """The Debian release of this machine, for programs that run with its libraries."""
    found = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else SUITE


def _mirror() -> str:
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for source in sources:
        if source.is_file():
            for line in source.read_text().splitlines():
                found = None if line.lstrip().startswith("#") else re.search(r"https?://\S+/debian/?(?=\s|$)", line)
                if found:
                    return found[0]
    raise LabError("the apt configuration of this machine names no Debian mirror\n"
                   "  cause: it is no Debian\n  try: run on Debian, or set MAIA_DEBIAN_MIRROR")


def _apt() -> Path:
    """Write the private apt's configuration, and get its lists once."""
    root = cache.folder() / "apt"
    config = root / "apt.conf"
    suites = list(dict.fromkeys((SUITE, BACKPORTS, host_suite())))
    mirror = os.environ.get("MAIA_DEBIAN_MIRROR") or _mirror()
    text = "\n".join([
        f'Dir "{root}/";', f'Dir::State "{root}/state";', f'Dir::State::status "{root}/state/status";',
        f'Dir::Cache "{root}/cache";', f'Dir::Etc "{root}/etc";', 'Dir::Etc::trusted "/etc/apt/trusted.gpg";',
        'Dir::Etc::trustedparts "/etc/apt/trusted.gpg.d";', 'APT::Architecture "amd64";',
        'APT::Architectures { "amd64"; };', 'APT::Install-Recommends "false";', 'APT::Install-Suggests "false";',
        f'APT::Sandbox::User "{"root" if os.geteuid() == 0 else ""}";', 'Acquire::Languages "none";',
        'Acquire::Retries "3";', ""])
    sources = "".join(f"deb [signed-by={_KEYRING} arch=amd64] {mirror} {suite} main\n" for suite in suites)
    with cache.locked("apt"):
        for name in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d",
                     "etc/sources.list.d"):
            (root / name).mkdir(parents=True, exist_ok=True)
        listed = root / "etc/sources.list"
        have = listed.exists() and listed.read_text() == sources and list((root / "state/lists").glob("*Packages*"))
        (root / "state/status").touch()
        config.write_text(text)
        if not have:
            listed.write_text(sources)
            _run("apt-get", "update", "-qq", config=config)
    return config


def _run(*command, config, cwd=None) -> str:
    done = subprocess.run(command, env={**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}, cwd=cwd, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise LabError(f"{' '.join(command[:2])} failed: {done.stderr.strip()[-2000:]}\n"
                       "  cause: no network to the Debian mirror, or its lists are old\n"
                       f"  try: remove {cache.folder() / 'apt'} and run again")
    return done.stdout


def depends_on(package: str, pattern: str) -> str:
    """The name of the package that a meta package stands for today: the mirror keeps only the newest kernel."""
    text = _run("apt-cache", "depends", package, config=_apt())
    found = re.search(rf"Depends: ({pattern})$", text, re.MULTILINE)
    if not found:
        raise LabError(f"the package {package} does not say what it stands for:\n{text}")
    return found[1]


def download(package: str, folder: Path) -> Path:
    """Fetch one package without what it depends on; returns the file."""
    config = _apt()
    folder.mkdir(parents=True, exist_ok=True)
    _run("apt-get", "download", "-qq", package, config=config, cwd=folder)
    return next(iter(folder.glob(f"{package}_*.deb")))


def unpack(target: Path, suite: str, *packages: str, without: str = "$^") -> None:
    """Unpack packages and all that they depend on, but those whose name matches `without`, into a folder."""
    config = _apt()
    archives = target.with_name(target.name + ".debs")
    try:
        (archives / "partial").mkdir(parents=True)
        _run("apt-get", "install", "-y", "-qq", "--download-only", "-o", f"Dir::Cache::archives={archives}/", "-t",
             suite, *packages, config=config)
        for name in ("bin", "sbin", "lib", "lib64"):
            (target / "usr" / name).mkdir(parents=True, exist_ok=True)
            if not (target / name).exists():
                (target / name).symlink_to(f"usr/{name}")
        for archive in sorted(archives.glob("*.deb")):
            if not re.match(without, archive.name):
                unpack_archive(archive, target)
    finally:
        cache.remove(archives)


def unpack_archive(archive: Path, target: Path) -> None:
    """Unpack one .deb file into a folder."""
    target.mkdir(parents=True, exist_ok=True)
    # Not `dpkg-deb -x`: it would put a folder in the place of the links bin, sbin, lib and lib64.
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as source:
        done = subprocess.run(["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", target],
                              stdin=source.stdout, stderr=subprocess.PIPE, text=True)
    if done.returncode or source.returncode:
        raise LabError(f"{archive.name} could not be unpacked: {done.stderr}")


def linked(root: Path, program: str) -> list[str]:
    """The command that runs a program of an unpacked Debian with that Debian's libraries."""
    return [f"{root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", f"{root}/{LIBRARIES}", f"{root}/{program}"]
